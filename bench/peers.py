"""The same work by others.  usage: peers.py numpy | peers.py faiss | peers.py faiss_scan | peers.py mlx_lm FOLDER [forward|own_text]...

Prints one JSON object {name: seconds or error}.  Runs in the benchmarks' own virtual environment; mlx_lm takes the BLAS that stands
first, so that OPENBLAS=path loads one before it (the wheel's own is the reference BLAS).
"""
import ctypes
import json
import os
import sys
import time

import numpy as np

GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
TOKENS = 2048


def best_seconds(work, repetitions):
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal_values(count):
    """veloxquant::Random(1).normal(), count times."""
    with np.errstate(over="ignore"):
        state = mix(np.uint64((1 + GOLDEN) & MASK)) ^ mix(mix(np.uint64(0)))
        steps = np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        uniform = (mix(state + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius, angle = uniform[0::2], uniform[1::2]
    return (np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)).astype(np.float32)


def correlated_values(rows, dim):
    """As kernels_bench.cpp's."""
    x = normal_values(rows * dim).reshape(rows, dim)
    scale = np.exp2(1 - 2 * np.arange(dim, dtype=np.float32) / np.float32(dim)).astype(np.float32)
    out = x.copy()
    out[:, 1:] = (np.float32(0.8) * x[:, 1:] + np.float32(0.6) * x[:, :-1]) * scale[1:]
    return out


def run_numpy():
    """A product on as many threads as OPENBLAS_NUM_THREADS says."""
    size = 1024
    a, b, c = np.full((size, size), 0.5, np.float32), np.full((size, size), 0.25, np.float32), np.empty((size, size), np.float32)
    return {"sgemm": best_seconds(lambda: np.matmul(a, b, out=c), 30)}


def run_faiss():
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    results = {}
    vectors = correlated_values(32768, 64)
    quantizer = faiss.ProductQuantizer(64, 16, 8)
    quantizer.cp.niter = 25
    quantizer.cp.max_points_per_centroid = 1 << 20  # all points, as ours
    results["train_codebook"] = best_seconds(lambda: quantizer.train(vectors), 3)
    decoded = quantizer.decode(quantizer.compute_codes(vectors))
    results["train_codebook_error"] = float(((decoded - vectors) ** 2).sum(1).mean())
    for dim, subspaces in ((64, 16), (128, 32)):
        vectors = normal_values(32768 * dim).reshape(-1, dim)
        quantizer = faiss.ProductQuantizer(dim, subspaces, 8)
        quantizer.cp.niter = 1  # any codebook is as fast as another
        quantizer.train(vectors)
        results[f"encode/{dim}/{subspaces}"] = best_seconds(lambda: quantizer.compute_codes(vectors), 5)
    return results


def run_faiss_scan():
    """One query over 2^20 keys of 16 codes, one thread: what packed_bench.cpp's scan does, and the ten best."""
    import faiss

    faiss.omp_set_num_threads(1)
    keys, dim, codes = 1 << 20, 64, 16
    vectors = normal_values(keys * dim).reshape(-1, dim)
    indexes = {8: faiss.IndexPQ(dim, codes, 8, faiss.METRIC_INNER_PRODUCT), 4: faiss.IndexPQFastScan(dim, codes, 4, faiss.METRIC_INNER_PRODUCT)}
    results = {}
    for bits, index in indexes.items():
        index.pq.cp.niter = 1  # any codebook is as fast as another
        index.train(vectors[:32768])
        index.add(vectors)
        results[f"scan/{bits}"] = best_seconds(lambda index=index: index.search(vectors[:1], 10), 20)
    return results


def run_mlx_lm(folder, works):
    if path := os.environ.get("OPENBLAS"):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model
    import pathlib

    mx.set_default_device(mx.cpu)
    model, config = load_model(pathlib.Path(folder))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    vocabulary = config["vocab_size"]
    results = {}
    if "forward" in works:
        tokens = mx.random.randint(0, vocabulary, (1, TOKENS))
        repetitions = int(os.environ.get("REPETITIONS", "3"))
        results["forward"] = best_seconds(lambda: mx.eval(model(tokens, cache=make_prompt_cache(model))), repetitions)
    if "own_text" in works:

        def own_text(sequences=32, length=1024):
            cache = make_prompt_cache(model)
            token = mx.zeros((sequences, 1), mx.int32)
            for _ in range(1, length):
                token = mx.random.categorical(model(token, cache=cache)[:, -1])[:, None]
                mx.eval(token)

        results["own_text"] = best_seconds(own_text, 1)
    return results


if __name__ == "__main__":
    works = {"numpy": run_numpy, "faiss": run_faiss, "faiss_scan": run_faiss_scan, "mlx_lm": lambda: run_mlx_lm(sys.argv[2], sys.argv[3:])}
    print(json.dumps(works[sys.argv[1]]()))
