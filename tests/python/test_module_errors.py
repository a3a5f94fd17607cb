"""What the Python module says of bad input."""
import inspect
import re
import warnings

import numpy as np
import pytest

pytest.importorskip("veloxquant_mlx", reason="the Python module is not built", exc_type=ModuleNotFoundError)

import veloxquant_mlx
import mlx.core as mx
from veloxquant_mlx.allocators import vecinfer
from veloxquant_mlx.allocators.ratequant import (
    DistortionCurve,
    SensitivityResult,
    allocate_bits_ratequant,
    calibrate_layer_sensitivities,
    fit_distortion_curve,
)

from live_models import FAMILIES, UNFIT, assert_same_parameters, live_model, parameters_of
from made_by_hand import by_hand, random


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_do_not_fit(name, own_tokenizer, words):
    arguments, layer = UNFIT[name]
    model = live_model(name, **arguments)
    before = parameters_of(model)
    for call in (calibrate_layer_sensitivities, vecinfer.calibrate_smooth_factors, veloxquant_mlx.calibrate):
        with pytest.raises(ValueError) as caught:
            call(model, own_tokenizer, text=words)
        assert layer in str(caught.value) or name in str(caught.value)
    assert_same_parameters(parameters_of(model), before)


def wrong_calls():
    keys, codebook, factors = random(5, 64), random(8, 16, 8), np.ones(64, np.float32)
    curves = {"layer_0": DistortionCurve("layer_0", 1.0, 1.2)}
    v, nan = vecinfer, float("nan")
    return {
        # functions on arrays: shapes
        "keys of another width": (lambda: v.apply_dual_transform_keys(keys[:, :32], factors), r"keys.*\[\.\., 64\].*\[5, 32\]"),
        "keys without a dimension": (lambda: v.apply_dual_transform_keys(np.ones((), np.float32), factors), r"keys.*\[\.\., 64\].*\[\]"),
        "factors of two layers": (lambda: v.apply_dual_transform_queries(keys, np.ones((2, 64), np.float32)), r"smooth_factors.*\[(64|head_dim)\].*\[2, 64\]"),
        "head_dim 48": (lambda: v.apply_dual_transform_keys(keys[:, :48], factors[:48]), "power of two.*48"),
        "codebook of all layers": (lambda: v.quantize_vq(keys, codebook[None]), r"codebook.*num_subspaces, num_centroids, subspace_dim.*\[1, 8, 16, 8\]"),
        "vectors of another codebook": (lambda: v.quantize_vq(keys, codebook[:4]), r"vectors.*\[\.\., 32\].*\[5, 64\]"),
        "queries of another codebook": (lambda: v.compute_query_lut(keys, codebook[:4]), r"queries.*\[\.\., 32\].*\[5, 64\]"),
        "codes of another codebook": (lambda: v.dequantize_vq(np.zeros((5, 7), np.uint8), codebook), r"codes.*\[\.\., 8\].*\[5, 7\]"),
        "too many centroids": (lambda: v.quantize_vq(random(1, 1), random(1, 70000, 1)), "65,?536"),
        # types and values
        "keys as a list": (lambda: v.apply_dual_transform_keys(keys.tolist(), factors), "keys.*array.*list"),
        "whole numbers for keys": (lambda: v.apply_dual_transform_keys(keys.astype(np.int32), factors), "keys.*floating.*int32"),
        "whole numbers of MLX": (lambda: v.quantize_vq(mx.ones((2, 64), mx.int32), codebook), "vectors.*floating.*int32"),
        "complex factors": (lambda: v.apply_dual_transform_keys(keys, factors.astype(np.complex64)), "smooth_factors.*floating.*complex"),
        "codes that are fractions": (lambda: v.dequantize_vq(np.ones((5, 8), np.float32), codebook), "codes.*whole numbers.*float32"),
        "codes in bfloat16": (lambda: v.dequantize_vq(mx.ones((5, 8), mx.bfloat16), codebook), "codes.*whole numbers.*bfloat16"),
        "codes too high": (lambda: v.dequantize_vq(np.full((5, 8), 16, np.uint8), codebook), "codes.*15.*16"),
        "codes below zero": (lambda: v.dequantize_vq(np.full((5, 8), -1, np.int32), codebook), "codes.*-1"),
        "keys with NaN": (lambda: v.apply_dual_transform_keys(keys * nan, factors), "keys.*finite.*nan"),
        "queries with NaN": (lambda: v.compute_query_lut(keys * nan, codebook), "queries.*finite.*nan"),
        "vectors with infinity": (lambda: v.quantize_vq(keys * np.inf, codebook), "vectors.*finite.*inf"),
        "codebook with NaN": (lambda: v.quantize_vq(keys, codebook * nan), "codebook.*finite.*nan"),
        "factors of zero": (lambda: v.apply_dual_transform_keys(keys, factors * 0), "smooth_factors.*above 0.*0"),
        "factors with NaN": (lambda: v.apply_dual_transform_keys(keys, factors * nan), "smooth_factors.*nan"),
        "size 3": (lambda: v.walsh_hadamard_matrix(3), "power of two.*3"),
        "size 0": (lambda: v.walsh_hadamard_matrix(0), "0"),
        "size 2.0": (lambda: v.walsh_hadamard_matrix(2.0), "d.*whole number.*2.0"),
        # sensitivities
        "no sensitivities": (lambda: fit_distortion_curve({}), "layer_0"),
        "layer of another name": (lambda: fit_distortion_curve({"first": SensitivityResult("first", 1, 1)}), "layer_0.*|first"),
        "key and name differ": (lambda: fit_distortion_curve({"layer_0": SensitivityResult("layer_1", 1, 1)}), "layer_0.*layer_1"),
        "layer left out": (lambda: fit_distortion_curve({k: r for k, r in by_hand(1, 1, 1).items() if k != "layer_1"}), "layer_1"),
        "sensitivity of NaN": (lambda: fit_distortion_curve(by_hand(1, nan)), "layer_1.*mean_sensitivity.*nan"),
        "sensitivity below zero": (lambda: fit_distortion_curve(by_hand(-1.0)), "layer_0.*mean_sensitivity.*-1"),
        "sensitivity in words": (lambda: fit_distortion_curve(by_hand("high")), "layer_0.*mean_sensitivity.*high"),
        "distortions of None": (lambda: fit_distortion_curve({"layer_0": SensitivityResult("layer_0", 1, 1, None)}), "layer_0.*distortions.*None"),
        "distortions of pairs": (lambda: fit_distortion_curve({"layer_0": SensitivityResult("layer_0", 1, 1, {"turboquant": [(1, 2)]})}), "layer_0.*turboquant"),
        "distortions of NaN": (
            lambda: fit_distortion_curve({"layer_0": SensitivityResult("layer_0", 1, 1, {"turboquant": [(1, 1, nan), (2, 1, 1)]})}), "layer_0.*turboquant.*nan"
        ),
        "one rate": (lambda: fit_distortion_curve(by_hand(1), [2.0]), "bit_rates.*two"),
        "rates of NaN": (lambda: fit_distortion_curve(by_hand(1), [1.0, nan]), "bit_rates.*nan"),
        "rate too low": (lambda: fit_distortion_curve(by_hand(1), [0.5, 1.0]), "0.5"),
        "rates that are one number": (lambda: fit_distortion_curve(by_hand(1), 2.0), "bit_rates.*float"),
        "rates in words": (lambda: fit_distortion_curve(by_hand(1), ["1", "2"]), "bit_rates.*(str|'1')"),
        "unknown quantizer": (lambda: fit_distortion_curve(by_hand(1), quantizer="best"), "best.*turboquant|turboquant.*best"),
        "quantizer 2": (lambda: fit_distortion_curve(by_hand(1), quantizer=2), "quantizer.*(int|2)"),
        # curves
        "no curves": (lambda: allocate_bits_ratequant({}), "layer"),
        "curve of another layer": (lambda: allocate_bits_ratequant({"layer_0": DistortionCurve("layer_1", 1.0, 1.0)}), "layer_0.*layer_1"),
        "alpha of NaN": (lambda: allocate_bits_ratequant({"layer_0": DistortionCurve("layer_0", nan, 1.0)}), "layer_0.*alpha.*nan"),
        "alpha in words": (lambda: allocate_bits_ratequant({"layer_0": DistortionCurve("layer_0", "a", 1.0)}), "layer_0.*alpha.*a"),
        "layer by number": (lambda: allocate_bits_ratequant({0: DistortionCurve("layer_0", 1.0, 1.0)}), "layer_0.*0"),
        "target below the least": (lambda: allocate_bits_ratequant(curves, 0.5), "target_bits.*1 to 4.*0.5"),
        "target of NaN": (lambda: allocate_bits_ratequant(curves, nan), "target_bits.*nan"),
        "least above most": (lambda: allocate_bits_ratequant(curves, 2.0, 3, 2), "min_bits.*3.*2"),
        "fractional bits": (lambda: allocate_bits_ratequant(curves, 2.0, 1.5), "min_bits.*1.5"),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_wrong_arguments_are_explained(name):
    call, pattern = wrong_calls()[name]
    with warnings.catch_warnings(), pytest.raises((ValueError, TypeError)) as caught:
        warnings.simplefilter("ignore", RuntimeWarning)
        call()
    assert re.search(pattern, str(caught.value), re.DOTALL), caught.value
    assert "incompatible function arguments" not in str(caught.value)


WRONG_OPTIONS = [
    (dict(num_samples=0), "num_samples.*0"), (dict(num_samples=1.5), "num_samples.*1.5"), (dict(num_samples=True), "num_samples.*True"),
    (dict(sequence_length=1), "sequence_length.*1"), (dict(sequence_length=5000), "2048.*5000"), (dict(noise_scale=0), "noise_scale.*0"),
    (dict(noise_scale=float("nan")), "noise_scale.*nan"), (dict(noise_scale="a"), "noise_scale.*a"), (dict(device="tpu"), "device.*cpu.*gpu.*tpu"),
    (dict(seed=-1), "seed.*-1"), (dict(seed=1.0), "seed.*1.0"), (dict(text=3), "text.*int"), (dict(text=b"bytes"), "text.*bytes"),
    (dict(text="too short"), "too short.*128"), (dict(text="\ud800" * 1000), "text.*(surrogate|Unicode|UTF-8|utf-8)"),
]


@pytest.mark.parametrize("options, pattern", WRONG_OPTIONS, ids=lambda value: ascii(value)[:40])
@pytest.mark.parametrize("live", [True, False])
def test_wrong_options_are_explained(live, options, pattern, demo, demo_model):
    with pytest.raises((ValueError, TypeError)) as caught:
        calibrate_layer_sensitivities(*(demo if live else (demo_model, None)), **{**dict(num_samples=2, sequence_length=64), **options})
    assert re.search(pattern, str(caught.value), re.DOTALL), caught.value
    assert "incompatible function arguments" not in str(caught.value)


def test_factors_must_be_those_of_the_model(demo, demo_model, words, own_code):
    for where in (demo, (demo_model, None)):
        for factors, pattern in (
            (np.ones((3, 64), np.float32), r"smooth_factors.*\[12, 64\].*\[3, 64\]"), (np.ones(64, np.float32), r"smooth_factors.*\[12, 64\].*\[64\]"),
            (np.zeros((12, 64), np.float32), "smooth_factors.*above 0"), ([[1.0] * 64] * 12, "smooth_factors.*array.*list"), (None, "smooth_factors.*None"),
        ):
            with pytest.raises((ValueError, TypeError), match=pattern):
                vecinfer.train_codebook(*where, factors, 2, 16, 8, 32, text=words)
        for options, pattern in (
            (dict(num_centroids=3), "num_centroids.*power of two.*3"), (dict(num_subspaces=7), "num_subspaces.*64.*7"), (dict(max_iter=0), "max_iter.*0"),
            (dict(num_samples=1, sequence_length=4), "too few.*256"),
        ):
            with pytest.raises(ValueError, match=pattern):
                vecinfer.train_codebook(*where, np.ones((12, 64), np.float32), **{**dict(num_samples=2, sequence_length=64), **options}, text=words)


PYPI_CALLS = {
    calibrate_layer_sensitivities: lambda model, tokenizer: calibrate_layer_sensitivities(model, tokenizer, ["a prompt"], 128, True),
    fit_distortion_curve: lambda *_: fit_distortion_curve(128),
    allocate_bits_ratequant: lambda *_: allocate_bits_ratequant([1.0, 2.0], 2.0),
    vecinfer.calibrate_smooth_factors: lambda *_: vecinfer.calibrate_smooth_factors(np.ones((16, 64), np.float32)),
    vecinfer.train_codebook: lambda *_: vecinfer.train_codebook(np.ones((512, 64), np.float32), 256),
}


@pytest.mark.parametrize("function", PYPI_CALLS, ids=lambda f: f.__name__)
def test_calls_in_the_style_of_a_package_of_a_similar_name(function, demo):
    """VeloxQuant-MLX on PyPI has functions of these names that take other arguments."""
    with pytest.raises(TypeError) as caught:
        PYPI_CALLS[function](*demo)
    assert f"{function.__name__}{inspect.signature(function)}" in str(caught.value)


def test_unknown_keyword_names_the_signature(demo):
    with pytest.raises(TypeError, match=r"(?s)n_samples.*calibrate_layer_sensitivities\(model, tokenizer, num_samples=32"):
        calibrate_layer_sensitivities(*demo, n_samples=3)


def test_models_and_tokenizers_that_are_none(demo, demo_model, tmp_path):
    model, tokenizer = demo
    for call in (calibrate_layer_sensitivities, vecinfer.calibrate_smooth_factors, veloxquant_mlx.calibrate):
        for wrong in (None, 3, [model], {"a": 1}, object(), np.ones(3)):
            with pytest.raises(TypeError, match=f"model.*{type(wrong).__name__}|{type(wrong).__name__}.*model"):
                call(wrong, tokenizer)
        for wrong in (None, "text", 3, object()):
            with pytest.raises(TypeError, match=f"tokenizer.*{type(wrong).__name__}|{type(wrong).__name__}.*tokenizer"):
                call(model, wrong)
        with pytest.raises(RuntimeError, match="nowhere"):
            call(tmp_path / "nowhere", None)


def test_tokenizer_with_more_tokens_than_the_model(demo, own_tokenizer, words):
    for name, arguments in (("llama", {}), ("olmo2", FAMILIES["olmo2"])):
        model = live_model(name, **{**arguments, "vocab_size": 4096})
        for tokenizer in (demo[1], own_tokenizer, demo[1]._tokenizer):
            for call in (calibrate_layer_sensitivities, veloxquant_mlx.calibrate):
                with pytest.raises(ValueError, match="tokenizer.*8191.*4096"):
                    call(model, tokenizer, text=words)


@pytest.mark.parametrize("token", [8192, -1, 2**31])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_tokens_beyond_the_model(name, token, demo_model):
    """A tokenizer that does not say how many it has."""

    class Odd:
        def encode(self, text, add_special_tokens=True):
            return [1, token] * 200

    model = live_model(name, **FAMILIES.get(name, {}))
    with pytest.raises(ValueError, match=f"token.*{token}|{token}.*token"):
        vecinfer.calibrate_smooth_factors(model, Odd(), 2, 16, text="any")


def test_tokenizer_that_gives_no_tokens(demo):
    class Odd:
        def encode(self, text, add_special_tokens=True):
            return "abc"

    with pytest.raises(TypeError, match="tokenizer"):
        vecinfer.calibrate_smooth_factors(demo[0], Odd(), 2, 16, text="any")


def test_errors_of_a_tokenizer_come_through(demo):
    class Odd:
        def encode(self, text, add_special_tokens=True):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vecinfer.calibrate_smooth_factors(demo[0], Odd(), 2, 16, text="any")


def test_files_that_are_no_text(demo, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 1000)
    for path, error in ((tmp_path / "missing", OSError), (tmp_path, OSError), (tmp_path / "binary", ValueError)):
        with pytest.raises((error, RuntimeError)) as caught:
            vecinfer.calibrate_smooth_factors(*demo, 2, 16, text=path)
        assert path.name in str(caught.value)


def test_no_text_and_nothing_to_begin_with():
    class Odd:
        def encode(self, text, add_special_tokens=True):
            return [1, 2]

    for name in ("llama", "olmo2"):
        with pytest.raises((ValueError, RuntimeError), match=r"pass (a text|text=)"):
            vecinfer.calibrate_smooth_factors(live_model(name, **FAMILIES.get(name, {})), Odd(), 2, 16)
