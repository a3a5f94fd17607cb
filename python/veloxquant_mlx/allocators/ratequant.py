"""RateQuant (arXiv 2605.06675): sensitivity → distortion curve → bits.

    sensitivities = calibrate_layer_sensitivities(model, tokenizer, num_samples=32)
    curves = fit_distortion_curve(sensitivities)
    allocation = allocate_bits_ratequant(curves, target_bits=2.0)
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .. import _inputs
from .._load import core
from .._progress import Progress
from .._sources import Source

__all__ = [
    "DistortionCurve",
    "DistortionPoint",
    "SensitivityResult",
    "allocate_bits_ratequant",
    "calibrate_layer_sensitivities",
    "fit_distortion_curve",
]


class DistortionPoint(NamedTuple):
    """Relative distortion of a quantizer on a layer's keys and on its values, at a rate in bits of codes an element."""

    rate: float
    keys: float
    values: float


@dataclass
class SensitivityResult:
    """How much a layer minds noise in its cache.

    mean_sensitivity: change of the output, √(2·KL), per unit of relative noise, mean over samples; std_sensitivity: its standard
    deviation over samples.  distortions: by quantizer, ascending in rate, measured on the same keys and values; may be left out.
    """

    layer_name: str
    mean_sensitivity: float
    std_sensitivity: float
    distortions: dict[str, list[DistortionPoint]] = field(default_factory=dict, repr=False)


@dataclass
class DistortionCurve:
    """D(r) = alpha · e^(−beta · r): predicted KL, in nats, of storing the layer at r bits of codes an element.

    r_squared: share of the variance of log D over the rates that the line explains.
    """

    layer_name: str
    alpha: float
    beta: float
    r_squared: float = 1.0

    def __call__(self, rate):
        return self.alpha * math.exp(-self.beta * rate)


@_inputs.documented
def calibrate_layer_sensitivities(
    model, tokenizer, num_samples=32, sequence_length=512, noise_scale=0.1, device="gpu", *, text=None, seed=0, progress=None
):
    """Measure how much the output changes when noise is put into one layer's keys and values.

    model: a live mlx_lm model, or a path to a folder with config.json, safetensors and tokenizer.json.
    tokenizer: mlx_lm's TokenizerWrapper, a Hugging Face tokenizer or veloxquant_mlx.Tokenizer; None for a folder: its own.
    num_samples, sequence_length: samples, and tokens of each; at least 1 and 2.
    noise_scale: standard deviation of the noise, relative to that of all of a layer's keys (after RoPE) or values; above 0.
    device: "gpu" or "cpu"; "gpu" without a GPU warns once and runs on the CPU.
    text: what to read, a str, a path or a list of these; None: text that the model writes itself.
    seed: of everything random, 0 to 2^64 - 1.  progress: True or False; None: on terminals and in notebooks.

    Returns {"layer_0": SensitivityResult, ...}, in order.
    Raises ValueError or TypeError that say what was expected, and RuntimeError for files that cannot be read.
    """
    num_samples = _inputs.integer("num_samples", num_samples)
    sequence_length = _inputs.integer("sequence_length", sequence_length, 2)
    noise_scale, seed, texts = _inputs.number("noise_scale", noise_scale), _inputs.seed(seed), _inputs.texts(text)
    if not noise_scale > 0 or not math.isfinite(noise_scale):
        raise ValueError(f"noise_scale: expected a number above 0, got {noise_scale}")
    with Source(model, tokenizer, device) as source, Progress(progress) as report:
        if source.engine is None:
            return _probe(source.own_forward, texts, num_samples, sequence_length, noise_scale, seed, report)
        found = core.calibrate_layer_sensitivities(
            source.engine, source.encoder, num_samples, sequence_length, noise_scale, source.device, texts, seed, report
        )
    return {
        name: SensitivityResult(**{**result, "distortions": _points(result["distortions"])}) for name, result in json.loads(found).items()
    }


@_inputs.documented
def fit_distortion_curve(sensitivities, bit_rates=[1.0, 1.5, 2.0, 3.0, 4.0], *, quantizer="turboquant"):
    """Fit a curve of predicted KL against bits to each layer.

    sensitivities: {"layer_0": SensitivityResult, ...}; results built by hand from the three documented fields are given the quantizer's
    distortion on a Gaussian.  bit_rates: at least two different rates, bits of codes an element, within what was measured (1 to 4).
    quantizer: "turboquant", "kivi" or "affine".

    Returns {"layer_0": DistortionCurve, ...}.  Raises ValueError or TypeError that name the layer and field.
    """
    given = _mapping("sensitivities", sensitivities, SensitivityResult)
    missing = [name for name in (f"layer_{i}" for i in range(len(given))) if name not in given]
    if missing:
        raise ValueError(f"sensitivities: expected every layer from layer_0, got none for {missing[0]}")
    records = json.dumps({name: _record(result) for name, result in given.items()})
    found = core.fit_distortion_curve(records, _inputs.numbers("bit_rates", bit_rates), _inputs.word("quantizer", quantizer))
    return {name: DistortionCurve(name, *numbers) for name, *numbers in found}


@_inputs.documented
def allocate_bits_ratequant(distortion_curves, target_bits=2.0, min_bits=1, max_bits=4):
    """Give whole bits to layers: least total distortion, on average at most target_bits.

    distortion_curves: {"layer_0": DistortionCurve, ...}.  min_bits, max_bits: 1 to 16; target_bits between them.
    Returns {"layer_0": bits, ...}; of equal allocations the lexicographically largest.  Raises ValueError or TypeError.
    """
    curves = _mapping("distortion_curves", distortion_curves, DistortionCurve)
    rows = [(name, *(_finite(name, field, getattr(curve, field)) for field in ("alpha", "beta", "r_squared"))) for name, curve in curves.items()]
    least, most = _inputs.integer("min_bits", min_bits), _inputs.integer("max_bits", max_bits)
    return dict(core.allocate_bits_ratequant(rows, _inputs.number("target_bits", target_bits), least, most))


def _mapping(name, value, kind):
    if not isinstance(value, dict):
        raise _inputs.WrongType(f'{name}: expected a dict {{"layer_0": {kind.__name__}, ...}}, got {type(value).__name__}')
    if not value:
        raise ValueError(f"{name}: expected at least layer_0, got no layers")
    for layer, entry in value.items():
        if not (isinstance(layer, str) and re.fullmatch(r"layer_(0|[1-9][0-9]*)", layer)):
            raise ValueError(f"{name}: expected names such as layer_0, got {layer!r}")
        if not isinstance(entry, kind):
            raise _inputs.WrongType(f"{name}[{layer!r}]: expected {kind.__name__}, got {type(entry).__name__}")
        if entry.layer_name != layer:
            raise ValueError(f"{name}[{layer!r}]: expected layer_name {layer!r}, got {entry.layer_name!r}")
    return value


def _finite(layer, name, value):
    value = _inputs.number(f"{layer}: {name}", value)
    if not math.isfinite(value):
        raise ValueError(f"{layer}: {name}: expected a finite number, got {value}")
    return value


def _record(result):
    numbers = {name: _finite(result.layer_name, name, getattr(result, name)) for name in ("mean_sensitivity", "std_sensitivity")}
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"{result.layer_name}: {name}: expected a number, at least 0, got {value}")
    if not isinstance(result.distortions, dict):
        raise TypeError(f"{result.layer_name}: distortions: expected a dict of lists of DistortionPoint, got {result.distortions!r}")
    points = {name: [_point(result.layer_name, name, point) for point in some] for name, some in result.distortions.items()}
    return {"layer_name": result.layer_name, **numbers, "distortions": points}


def _point(layer, quantizer, point):
    if not isinstance(point, (tuple, list)) or len(point) != 3:
        raise TypeError(f"{layer}: distortions[{quantizer!r}]: expected (rate, keys, values), got {point!r}")
    return {field: _finite(layer, f"distortions[{quantizer!r}]: {field}", x) for field, x in zip(DistortionPoint._fields, point)}


def _points(distortions):
    return {name: [DistortionPoint(**point) for point in points] for name, points in distortions.items()}


def _probe(model, texts, num_samples, sequence_length, noise_scale, seed, report):
    samples = model.samples(texts, num_samples, sequence_length, seed, report)
    observed = model.observe(samples, report)
    deviations, results = [], {}
    for layer in range(model.num_layers):
        keys, values = observed.keys(layer), observed.values(layer)
        deviations.append([noise_scale * float(np.std(x, dtype=np.float64)) for x in (keys, values)])
        found = core.measure_distortions(keys, values, model.head_dim, sequence_length, seed)
        results[f"layer_{layer}"] = _points(json.loads(found))
        report("measuring distortions", layer + 1, model.num_layers)
    changes = model.output_changes(samples, deviations, seed, report) / noise_scale
    return {
        name: SensitivityResult(name, float(np.mean(change)), float(np.std(change)), points)
        for (name, points), change in zip(results.items(), changes, strict=True)
    }
