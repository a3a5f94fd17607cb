"""VecInfer (arXiv 2510.06175): smooth factors, a dual transform, product quantisation and look-up tables.

All of it is about keys after RoPE, all KV heads of a layer together.  Arrays may be numpy or mlx.core, and what comes back is of the
same kind; calibration returns numpy.
"""

import mlx.core as mx
import numpy as np

from .. import _inputs
from .._load import core
from .._progress import Progress
from .._sources import Source

__all__ = [
    "apply_dual_transform_keys",
    "apply_dual_transform_queries",
    "calibrate_smooth_factors",
    "compute_query_lut",
    "dequantize_vq",
    "quantize_vq",
    "train_codebook",
    "walsh_hadamard_matrix",
]


@_inputs.documented
def calibrate_smooth_factors(
    model, tokenizer, num_samples=64, sequence_length=256, *, text=None, seed=0, device="gpu", progress=None
):
    """λᵢ = √max|Kᵢ| over samples, tokens and KV heads; never zero: a dead channel gets 1.

    The arguments are those of ratequant.calibrate_layer_sensitivities.  Returns numpy float32 [num_layers, head_dim].
    Raises as that does.
    """
    num_samples, length = _inputs.integer("num_samples", num_samples), _inputs.integer("sequence_length", sequence_length, 2)
    seed, texts = _inputs.seed(seed), _inputs.texts(text)
    with Source(model, tokenizer, device) as source, Progress(progress) as report:
        if source.engine is not None:
            return core.calibrate_smooth_factors(source.engine, source.encoder, num_samples, length, texts, seed, source.device, report)
        live = source.own_forward
        observed = live.observe(live.samples(texts, num_samples, length, seed, report), report)
        return np.stack([core.layer_smooth_factors(observed.keys(layer), live.head_dim) for layer in range(live.num_layers)])


@_inputs.documented
def train_codebook(
    model,
    tokenizer,
    smooth_factors,
    num_samples=128,
    num_centroids=256,
    num_subspaces=8,
    sequence_length=256,
    max_iter=100,
    *,
    text=None,
    seed=0,
    device="gpu",
    progress=None,
):
    """K-means per sub-space on transformed keys.

    smooth_factors: [num_layers, head_dim], finite and above 0.  num_centroids: a power of two from 2 to 4096.  num_subspaces: a divisor of
    head_dim, which is a power of two.  The others are those of ratequant.calibrate_layer_sensitivities.

    Returns float32 [num_layers, num_subspaces, num_centroids, head_dim / num_subspaces], of the kind of smooth_factors.
    Raises as that does, and ValueError for fewer keys than centroids.
    """
    counts = {
        "num_samples": num_samples,
        "num_centroids": num_centroids,
        "num_subspaces": num_subspaces,
        "sequence_length": sequence_length,
        "max_iter": max_iter,
    }
    num_samples, num_centroids, num_subspaces, length, max_iter = (_inputs.integer(name, value) for name, value in counts.items())
    factors = _inputs.Array("smooth_factors", smooth_factors)
    seed, texts = _inputs.seed(seed), _inputs.texts(text)
    with Source(model, tokenizer, device) as source, Progress(progress) as report:
        if source.engine is not None:
            trained = core.train_codebook(
                source.engine,
                source.encoder,
                factors.numpy,
                num_samples,
                num_centroids,
                num_subspaces,
                length,
                max_iter,
                texts,
                seed,
                source.device,
                report,
            )
            return factors.same_kind(trained)
        live = source.own_forward
        core.check_codebook_options(live.num_layers, live.head_dim, factors.numpy, num_centroids, num_subspaces, max_iter)
        observed = live.observe(live.samples(texts, num_samples, length, seed, report), report)
        layers = []
        for layer in range(live.num_layers):
            keys, own = observed.keys(layer), factors.numpy[layer]
            layers.append(core.train_layer_codebook(keys, own, num_centroids, num_subspaces, max_iter, seed, layer))
            report("training codebooks", layer + 1, live.num_layers)
        return factors.same_kind(np.stack(layers))


@_inputs.documented
def walsh_hadamard_matrix(d):
    """The orthonormal Walsh–Hadamard matrix, numpy float32 [d, d]: its own transpose and inverse.

    d: a power of two up to 65536.  Raises ValueError for others.
    """
    return core.walsh_hadamard_matrix(_inputs.integer("d", d))


@_inputs.documented
def apply_dual_transform_keys(keys, smooth_factors):
    """(K ⊘ λ)·H: keys [.., head_dim], one layer's smooth_factors [head_dim], above 0 → float32, the same shape.

    Raises ValueError or TypeError for other shapes, types and values that are not finite.
    """
    return _transformed(core.apply_dual_transform_keys, "keys", keys, smooth_factors)


@_inputs.documented
def apply_dual_transform_queries(queries, smooth_factors):
    """(q ⊙ λ)·H, so that q'·k' = q·k: queries [.., head_dim], one layer's smooth_factors [head_dim], above 0 → float32, the same shape.

    Raises ValueError or TypeError for other shapes, types and values that are not finite.
    """
    return _transformed(core.apply_dual_transform_queries, "queries", queries, smooth_factors)


@_inputs.documented
def quantize_vq(vectors, codebook):
    """Nearest centroids: vectors [.., head_dim], one layer's codebook [num_subspaces, num_centroids, subspace_dim] → codes
    [.., num_subspaces] in uint8, or uint16 for more than 256 centroids (65,536 at most).

    Raises ValueError or TypeError for other shapes, types and values that are not finite.
    """
    given, entries = _inputs.Array("vectors", vectors), _inputs.Array("codebook", codebook)
    return given.same_kind(core.quantize_vq(given.numpy, entries.numpy))


@_inputs.documented
def dequantize_vq(codes, codebook):
    """The centroids that codes name: codes [.., num_subspaces], whole numbers below num_centroids, one layer's codebook [num_subspaces,
    num_centroids, subspace_dim] → float32 [.., head_dim], of the kind of codes.

    Raises ValueError or TypeError for other shapes, types and codes.
    """
    entries, is_mlx = _inputs.Array("codebook", codebook), isinstance(codes, mx.array)
    if not is_mlx and not isinstance(codes, np.ndarray):
        raise _inputs.WrongType(f"codes: expected a numpy.ndarray or mlx.core.array, got {type(codes).__name__}")
    if entries.numpy.ndim != 3:
        raise ValueError(f"codebook: expected a shape [num_subspaces, num_centroids, subspace_dim], got {list(entries.numpy.shape)}")
    if not (mx.issubdtype(codes.dtype, mx.integer) if is_mlx else np.issubdtype(codes.dtype, np.integer)):
        raise _inputs.WrongType(f"codes: expected whole numbers, got {codes.dtype}")
    values = np.asarray(codes)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < entries.numpy.shape[1]:
        raise ValueError(f"codes: expected values from 0 to {entries.numpy.shape[1] - 1}, got {values.min()} to {values.max()}")
    vectors = core.dequantize_vq(np.asarray(values, np.uint16, order="C"), entries.numpy)
    return mx.array(vectors) if is_mlx else vectors


@_inputs.documented
def compute_query_lut(queries, codebook):
    """Inner products with the centroids, whose sum over the codes of a key is its score: queries [.., head_dim], one layer's codebook →
    [.., num_subspaces, num_centroids].

    Raises ValueError or TypeError for other shapes, types and values that are not finite.
    """
    given, entries = _inputs.Array("queries", queries), _inputs.Array("codebook", codebook)
    return given.same_kind(core.compute_query_lut(given.numpy, entries.numpy))


def _transformed(function, name, vectors, smooth_factors):
    given, factors = _inputs.Array(name, vectors), _inputs.Array("smooth_factors", smooth_factors)
    return given.same_kind(function(given.numpy, factors.numpy))
