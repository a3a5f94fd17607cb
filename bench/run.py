"""Ours, the machine's limit and peers in one run: prints the table of docs/results.md and writes bench.json.

usage: run.py BUILD_FOLDER [MODEL_FOLDER]...    models: the bundled one, and those named
"""
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import end_to_end

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
GOALS = {"demo": 6, "mid": 3}  # times faster than mlx_lm with OpenBLAS
OTHER_GOAL = 3
THREADS = 2
# What would bind one side alone: our programs have a pool of their own.
UNSET = ("OPENBLAS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "VELOXQUANT_BENCH_TARGET")


class Table:
    def __init__(self):
        self.rows = []

    def add(self, work, ours, theirs, peer, ratio, goal, also=True):
        """`goal`: ">= 3" or "<= 1.8", of the ratio, or None; `also`: what must hold besides."""
        sign, bound = goal.split() if goal else (">=", "0")
        met = (ratio >= float(bound) if sign == ">=" else ratio <= float(bound)) and bool(also)
        goal = goal or "–"
        self.rows.append({"work": work, "ours": ours, "theirs": theirs, "peer": peer, "ratio": round(ratio, 3), "goal": goal, "met": met})
        print(f"  {work}: {ratio:.2f} against {peer} (goal {goal}{'' if met else ', MISSED'})" if goal != "–" else f"  {work}: {ratio:.2f} against {peer}", flush=True)

    def markdown(self):
        lines = ["| work | ours | peer or limit | theirs | ratio | goal | met |", "|---|---|---|---|---|---|---|"]
        for row in self.rows:
            lines.append(f"| {row['work']} | {number(row['ours'])} | {row['peer']} | {number(row['theirs'])} | {row['ratio']:.2f} "
                         f"| {row['goal']} | {'yes' if row['met'] else 'no'} |")
        return "\n".join(lines)


def number(value):
    return f"{value:.4g}"


def google_benchmark(program, *arguments, environment=None, repetitions=3):
    """{name: the fastest of the repetitions}; times in seconds."""
    command = [program, *map(str, arguments), "--benchmark_format=json", f"--benchmark_repetitions={repetitions}", "--benchmark_min_time=0.05"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    units = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
    results = {}
    for run in json.loads(out.stdout)["benchmarks"]:
        if run["run_type"] != "iteration":
            continue
        run["seconds"] = run["real_time"] * units[run["time_unit"]]
        name = run["run_name"].removesuffix("/real_time").removesuffix("/process_time")
        if name not in results or run["seconds"] < results[name]["seconds"]:
            results[name] = run
    return results


def peers(*arguments, **environment):
    command = [PEER_PYTHON, ROOT / "bench" / "peers.py", *map(str, arguments)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return json.loads(out.stdout.splitlines()[-1])


def openblas(engine_bench):
    """The OpenBLAS that our programs are linked to, under the names that MLX calls."""
    renamed = engine_bench.parent.parent / "bench" / "libopenblas_for_peers.so"
    if renamed.exists():
        return renamed
    libraries = subprocess.run(["ldd", engine_bench], check=True, capture_output=True, text=True).stdout
    found = re.search(r"libopenblas\S* => (\S+)", libraries)
    if not found:
        raise RuntimeError(f"{engine_bench} is not linked to OpenBLAS")
    return found.group(1)


def engine_rows(table, engine_bench, folder, slow_peers):
    name = folder.name
    filters = "sgemm|forward|forward_and_backward"
    ours = google_benchmark(engine_bench, folder, f"--benchmark_filter=^({filters})/")
    blas = openblas(engine_bench)
    theirs = peers("mlx_lm", folder, "forward", OPENBLAS=blas)
    forward = ours["forward"]["seconds"]
    limit = ours["forward"]["flops"] / ours["sgemm"]["flops"] * ours["sgemm"]["seconds"]
    work = f"forward, {name}, 2048 tokens"
    table.add(work, forward, limit, "all FLOPs at the rate of sgemm 2048x256x1024", forward / limit, "<= 1.8")
    goal = f">= {GOALS.get(name, OTHER_GOAL)}"
    table.add(work, forward, theirs["forward"], "mlx_lm with OpenBLAS loaded", theirs["forward"] / forward, goal)
    if slow_peers:
        plain = peers("mlx_lm", folder, "forward", REPETITIONS="1")
        table.add(work, forward, plain["forward"], "mlx_lm as installed", plain["forward"] / forward, ">= 1")
    both = ours["forward_and_backward"]["seconds"]
    table.add(f"forward and backward, {name}, 2048 tokens", both, forward, "our forward", both / forward, "<= 3")


def sampling_and_probe_rows(table, engine_bench, folder):
    # One after the other, twice: a machine's speed drifts over minutes.
    ours = theirs = float("inf")
    for _ in range(2):
        ours = min(ours, google_benchmark(engine_bench, folder, "--benchmark_filter=^own_text/", repetitions=1)["own_text"]["seconds"])
        theirs = min(theirs, peers("mlx_lm", folder, "own_text", OPENBLAS=openblas(engine_bench))["own_text"])
    table.add(f"sampling, {folder.name}, 32 sequences to 1024 tokens", ours, theirs, "mlx_lm with OpenBLAS loaded, the same loop",
              theirs / ours, ">= 2")
    ours = google_benchmark(engine_bench, folder, "--benchmark_filter=^(probe|probe_forward|adjoint_probe)/", repetitions=2)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    probe, forward = ours["probe"]["seconds"], ours["probe_forward"]["seconds"]
    table.add(f"calibrate_layer_sensitivities, {folder.name}, 32 samples of 512 tokens", probe, forward,
              "a forward pass over its tokens", probe / forward, f"<= {0.75 * (layers + 1):g}")
    adjoint = ours["adjoint_probe"]["seconds"]
    table.add(f"gradients for adjoint prediction, {folder.name}, 32 samples of 512 tokens", adjoint, forward,
              "a forward pass over its tokens", adjoint / forward, "<= 6")


def targets():
    """(what to add to a row's name, environment) of each instruction set that is measured: the best, and AVX2."""
    yield "", {}
    if "avx512f" in pathlib.Path("/proc/cpuinfo").read_text():
        yield ", AVX2", {"VELOXQUANT_BENCH_TARGET": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}


def sgemm_rows(table, kernels_bench):
    for suffix, environment in targets():
        for threads in (1, THREADS):
            # One after the other, three times: a machine's speed drifts over minutes.
            ours = theirs = float("inf")
            for _ in range(3):
                run = google_benchmark(kernels_bench, f"--benchmark_filter=^sgemm_on/{threads}/", environment=environment)[f"sgemm_on/{threads}"]
                ours = min(ours, run["seconds"])
                theirs = min(theirs, peers("numpy", OPENBLAS_NUM_THREADS=str(threads), **environment)["sgemm"])
            table.add(f"sgemm 1024x1024x1024, threads: {threads}{suffix}", run["flops"] / ours, run["flops"] / theirs, "NumPy's wheel, FLOP/s",
                      theirs / ours, ">= 0.95")


def product_quantisation_rows(table, kernels_bench):
    filters = "--benchmark_filter=^(sgemm|train_codebook|encode/64/16/256|encode/128/32/256)/"
    theirs = peers("faiss")
    for suffix, environment in targets():
        ours = google_benchmark(kernels_bench, filters, environment=environment)
        sgemm = ours["sgemm"]["flops"] / ours["sgemm"]["seconds"]

        def add(work, run, peer_name, peer_seconds, also=True):
            rate = run["flops"] / run["seconds"]
            table.add(work + suffix, rate, sgemm, f"sgemm{suffix}, FLOP/s", rate / sgemm, ">= 0.35")
            if not suffix:
                table.add(work, run["seconds"], peer_seconds, peer_name, peer_seconds / run["seconds"], ">= 3", also)

        run = ours["train_codebook"]
        no_worse = run["error"] <= theirs["train_codebook_error"]
        add("k-means, 32768x64, 16 sub-spaces x 256, 25 iterations", run,
            f"faiss train (error {theirs['train_codebook_error']:.4f}, ours {run['error']:.4f})", theirs["train_codebook"], no_worse)
        for dim, subspaces in ((64, 16), (128, 32)):
            add(f"encoding, {subspaces} x 8 bits, D {dim}", ours[f"encode/{dim}/{subspaces}/256"], "faiss compute_codes",
                theirs[f"encode/{dim}/{subspaces}"])


def packed_attention_rows(table, packed_bench):
    wide = len(list(targets())) > 1
    peers_of_decode = {"mlx_attention": "mx.fast.scaled_dot_product_attention, float32, OpenBLAS",
                       "mlx_quantized_attention": "mlx_lm's quantised attention, 4 bits"}
    for suffix, environment in targets():
        runs = google_benchmark(packed_bench, "--benchmark_filter=^(decode|read_fp16|mlx_)", "--benchmark_enable_random_interleaving=true",
                                environment=environment, repetitions=9)
        for heads, what in (("4/2", "4/2/64"), ("32/8", "32/8/128")):
            read = runs[f"read_fp16/{what}"]
            limit = read["bytes"] * read["seconds"] / read["read"]
            for keys, flag in (("plane", 1), ("full", 0)):
                if f"decode/{what}/{flag}" not in runs:
                    continue
                ours = runs[f"decode/{what}/{flag}"]["seconds"]
                work = f"one query over 32,768 packed tokens, {heads} heads D {what.split('/')[-1]}, 2 bits, {keys}{suffix}"
                goal = "<= 8" if not flag else "<= 2" if wide and not suffix else "<= 3"
                table.add(work, ours, limit, "reading fp16 keys and values once", ours / limit, goal)
                for peer, name in peers_of_decode.items():
                    if flag:
                        theirs = runs[f"{peer}/{what}"]["seconds"]
                        table.add(work, ours, theirs, name, theirs / ours, ">= 5")
        # One after the other, twice: a machine's speed drifts over minutes.
        ours, theirs, error = {}, {}, 0.0
        for _ in range(2):
            for name, run in google_benchmark(packed_bench, "--benchmark_filter=^scan/", environment=environment, repetitions=5).items():
                ours[name] = min(ours.get(name, float("inf")), run["seconds"])
                error = max(error, run["error"])
            for name, seconds in peers("faiss_scan").items():
                theirs[name] = min(theirs.get(name, float("inf")), seconds)
        goal = ">= 4" if wide and not suffix else ">= 1.2"
        table.add(f"LUT scan, 16 x 8 bits, 2^20 keys, one thread{suffix}", ours["scan/8"], theirs["scan/8"], "faiss IndexPQ",
                  theirs["scan/8"] / ours["scan/8"], goal, error < 1e-3)
        if not suffix:
            table.add("LUT scan, 16 x 4 bits, 2^20 keys, one thread", ours["scan/4"], theirs["scan/4"], "faiss IndexPQFastScan",
                      theirs["scan/4"] / ours["scan/4"], ">= 1")


def prefill_rows(table, prefill_bench, folder):
    runs = google_benchmark(prefill_bench, folder, "--benchmark_filter=^prefill/")
    full = runs["prefill/float32"]["seconds"]
    for keys in ("plane", "full"):
        ours = runs[f"prefill/{keys}"]["seconds"]
        table.add(f"reading 2048 tokens in chunks of 512, {folder.name}, 2 bits, {keys}", ours, full, "our full precision", ours / full, "<= 1.4")


def float32_bytes(folder):
    """Of all weights."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        total += sum(4 * math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total


def memory_row(table, program, folder):
    """Peak resident memory of the calibration that takes most, beyond the weights in float32, in GB."""
    peaks = {}
    for name, options in {"vecinfer": [], "turboquant, a width per layer": ["--method", "turboquant", "--units", "layer"]}.items():
        with tempfile.TemporaryDirectory() as out:
            command = [program, "calibrate", folder, "-o", os.path.join(out, "plan.safetensors"), "--json", *options]
            process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                raise RuntimeError(f"{command} failed")
            peaks[name] = usage.ru_maxrss * 1024
    name, peak = max(peaks.items(), key=lambda item: item[1])
    weights = float32_bytes(folder)
    table.add(f"peak memory of calibrate ({name}), {folder.name}, beyond float32 weights", peak / 1e9, weights / 1e9, "float32 weights, GB",
              (peak - weights) / 1e9, "<= 1")


def main(build, models):
    start = time.time()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # children inherit it
    for name in UNSET:
        os.environ.pop(name, None)
    programs = build / "bin"
    version = subprocess.run([programs / "veloxquant", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    print(f"{len(os.sched_getaffinity(0))} threads; {version}")
    if len(models) == 1:
        print("no model besides the bundled one: rows of mid are not measured, and memory is that of the bundled model")
    table = Table()
    sgemm_rows(table, programs / "kernels_bench")
    product_quantisation_rows(table, programs / "kernels_bench")
    packed_attention_rows(table, programs / "packed_bench")
    prefill_rows(table, programs / "prefill_bench", models[0])
    for folder in models:
        engine_rows(table, programs / "engine_bench", folder, slow_peers=folder == models[0])
    sampling_and_probe_rows(table, programs / "engine_bench", models[0])
    memory_row(table, programs / "veloxquant", models[-1])
    end_to_end.rows(table, build, "cpu", PEER_PYTHON, openblas(programs / "engine_bench"))
    (build / "bench.json").write_text(json.dumps(table.rows, indent=1) + "\n")
    print(f"\n{table.markdown()}\n\n{time.time() - start:.0f} s; {sum(not row['met'] for row in table.rows)} of {len(table.rows)} goals missed")


if __name__ == "__main__":
    folders = [ROOT / "examples" / "demo", *map(pathlib.Path, sys.argv[2:])]
    main(pathlib.Path(sys.argv[1]).resolve(), folders)
