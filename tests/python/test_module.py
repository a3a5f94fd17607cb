"""The Python module: the documented calls on live models and folders, against the program, MLX and NumPy; errors; manners."""
import copy
import inspect
import itertools
import json
import os
import pickle
import pydoc
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import nbclient
import nbformat
import numpy as np
import pytest

from conftest import MODULE, ROOT

if not list(MODULE.glob("veloxquant_mlx/_core*.so")):
    pytest.skip("the Python module is not built", allow_module_level=True)

import veloxquant_mlx
import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import KVCache, make_prompt_cache
from veloxquant_mlx import Plan
from veloxquant_mlx.allocators import ratequant, vecinfer
from veloxquant_mlx.allocators.ratequant import (
    DistortionCurve,
    DistortionPoint,
    SensitivityResult,
    allocate_bits_ratequant,
    calibrate_layer_sensitivities,
    fit_distortion_curve,
)

from live_models import FAMILIES, UNFIT, assert_same_parameters, live_model, parameters_of

# The same arithmetic by other code: relative.
SAME_NUMBERS = 0.01

PROBE = dict(num_samples=3, sequence_length=64)


@pytest.fixture(scope="session")
def words():
    """Some 2,500 tokens of English."""
    rng = np.random.default_rng(0)
    nouns = "storm sea letter doctor window garden horse river winter candle road stranger captain lady silence".split()
    sentence = "The captain of the ship said that the weather would change before the morning, and he was right; "
    return "".join(sentence + f"the {rng.choice(nouns)} and the {rng.choice(nouns)} of number {rng.integers(1000)}. " for _ in range(64))


@pytest.fixture(scope="session")
def text_file(words, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words)
    return path


@pytest.fixture(scope="session")
def demo(demo_model):
    return mlx_lm.load(str(demo_model))


@pytest.fixture(scope="session")
def own_tokenizer(demo_model):
    return veloxquant_mlx.Tokenizer.load(demo_model)


@pytest.fixture
def own_code(monkeypatch):
    """Live models run by their own code, as if the engine had none of their families."""
    monkeypatch.setattr("veloxquant_mlx._sources.engine_model", lambda *_, **__: None)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no GPU back end")
        warnings.filterwarnings("ignore", "no facts are sown")
        warnings.filterwarnings("ignore", "own text")
        yield


@pytest.fixture(scope="session")
def keys_of(words):
    """Keys after RoPE of the first tokens of the text, by mlx_lm: [num_layers, num_kv_heads, length, head_dim]; and their text."""

    def keys_of(model, tokenizer, length):
        tokens = tokenizer.encode(words)[:length]
        caches = [KVCache() for _ in model.layers]
        mx.eval(model(mx.array([tokens]), cache=caches))
        return np.stack([np.array(cache.state[0].astype(mx.float32))[0] for cache in caches])

    return keys_of


def close(ours, theirs, tolerance=SAME_NUMBERS):
    assert list(ours) == list(theirs)
    for name in ours:
        for field in ("mean_sensitivity", "std_sensitivity"):
            a, b = getattr(ours[name], field), getattr(theirs[name], field)
            # the deviation over a few samples is a small difference: of the size of the mean
            assert abs(a - b) <= tolerance * abs(theirs[name].mean_sensitivity), (name, field, a, b)
        assert ours[name].distortions.keys() == theirs[name].distortions.keys()
        for quantizer, points in ours[name].distortions.items():
            np.testing.assert_allclose(points, theirs[name].distortions[quantizer], rtol=tolerance)


def by_hand(*means):
    return {f"layer_{i}": SensitivityResult(f"layer_{i}", mean, 0.1) for i, mean in enumerate(means)}


# The documented API ---------------------------------------------------------------------------------------------------------------

DOCUMENTED = {
    calibrate_layer_sensitivities: 'model, tokenizer, num_samples=32, sequence_length=512, noise_scale=0.1, device="gpu"',
    fit_distortion_curve: "sensitivities, bit_rates=[1.0, 1.5, 2.0, 3.0, 4.0]",
    allocate_bits_ratequant: "distortion_curves, target_bits=2.0, min_bits=1, max_bits=4",
    vecinfer.calibrate_smooth_factors: "model, tokenizer, num_samples=64, sequence_length=256",
    vecinfer.train_codebook: (
        "model, tokenizer, smooth_factors, num_samples=128, num_centroids=256, num_subspaces=8, sequence_length=256, max_iter=100"
    ),
    vecinfer.walsh_hadamard_matrix: "d",
    vecinfer.apply_dual_transform_keys: "keys, smooth_factors",
    vecinfer.apply_dual_transform_queries: "queries, smooth_factors",
    vecinfer.quantize_vq: "vectors, codebook",
    vecinfer.dequantize_vq: "codes, codebook",
    vecinfer.compute_query_lut: "queries, codebook",
}


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda f: f.__name__)
def test_documented_signatures(function):
    documented = inspect.signature(eval(f"lambda {DOCUMENTED[function]}: 0")).parameters.values()
    ours = inspect.signature(function).parameters
    positional = [p for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [p.name for p in documented]
    for mine, theirs in zip(positional, documented):
        assert mine.default == theirs.default or list(mine.default) == theirs.default
    if "model" in ours:
        assert ours["text"].kind is ours["seed"].kind is inspect.Parameter.KEYWORD_ONLY
        assert ours["text"].default is None and ours["seed"].default == 0


@pytest.mark.parametrize("module", [ratequant, vecinfer])
def test_public_names_are_the_documented_ones(module):
    functions = {f.__name__ for f in DOCUMENTED if f.__module__ == module.__name__}
    assert functions <= set(module.__all__)
    assert all(name in functions or inspect.isclass(getattr(module, name)) for name in module.__all__)


def test_three_calls(demo):
    model, tokenizer = demo
    sensitivities = calibrate_layer_sensitivities(model, tokenizer, **PROBE)
    curves = fit_distortion_curve(sensitivities)
    allocation = allocate_bits_ratequant(curves, target_bits=2.0)
    names = [f"layer_{i}" for i in range(12)]
    assert list(sensitivities) == list(curves) == list(allocation) == names
    for name in names:
        assert sensitivities[name].layer_name == curves[name].layer_name == name
        assert sensitivities[name].mean_sensitivity > 0 and curves[name].alpha > 0 and 1 < curves[name].beta < 2 * np.log(2)
        assert {type(bits) for bits in allocation.values()} == {int}
    assert sum(allocation.values()) == 24


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_three_calls_on_mid(packed, shared, tmp_path):
    folder = shared / "models" / "mid"
    if packed:
        mlx_lm.convert(str(folder), mlx_path=str(tmp_path / "mid4"), quantize=True, q_bits=4)
        folder = tmp_path / "mid4"
    model, tokenizer = mlx_lm.load(str(folder))

    sensitivities = calibrate_layer_sensitivities(model, tokenizer, num_samples=32)
    curves = fit_distortion_curve(sensitivities)
    allocation = allocate_bits_ratequant(curves, target_bits=2.0)
    assert list(allocation) == [f"layer_{i}" for i in range(len(model.layers))]
    assert sum(allocation.values()) == 2 * len(allocation) and len(set(allocation.values())) > 1


def test_results_print_compare_and_pickle():
    point = DistortionPoint(1.0, 0.25, 0.5)
    result = SensitivityResult("layer_3", 1.5, 0.25, {"turboquant": [point]})
    assert repr(result) == "SensitivityResult(layer_name='layer_3', mean_sensitivity=1.5, std_sensitivity=0.25)"
    curve = DistortionCurve("layer_3", 2.0, 1.25, 0.5)
    assert repr(curve) == "DistortionCurve(layer_name='layer_3', alpha=2.0, beta=1.25, r_squared=0.5)"
    assert curve(2) == pytest.approx(2 * np.exp(-2.5))
    for thing in (result, curve):
        for other in (pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing)):
            assert other == thing and type(other) is type(thing)
    assert result != SensitivityResult("layer_3", 1.5, 0.5) and curve != DistortionCurve("layer_3", 2.0, 1.5)


def test_results_by_hand():
    """The three documented fields, numbers of NumPy too, in any order: ten comes after two."""
    results = by_hand(*np.linspace(0.1, 2, 12, dtype=np.float32))
    shuffled = dict(sorted(results.items()))
    assert list(shuffled) != list(results)
    curves = fit_distortion_curve(shuffled)
    assert list(curves) == list(results) and len({curve.beta for curve in curves.values()}) == 1
    bits = allocate_bits_ratequant(dict(sorted(curves.items())), 2.5)
    assert list(bits) == list(results) and list(bits.values()) == sorted(bits.values()) and sum(bits.values()) == 30
    for rates in ([1.0, 2.0], (1, 2, 3), np.array([1.0, 2.0])):
        assert fit_distortion_curve(results, rates)["layer_0"].r_squared > 0.99


def test_curves_are_least_squares_of_measured_distortions():
    """log D over the rates, D the mean of keys and values, times ½·(mean² + std²)."""
    rng, rates = np.random.default_rng(0), np.array([1.0, 1.5, 2.0, 3.0, 4.0])
    points = [DistortionPoint(rate, *(np.exp(-1.2 * rate) * rng.uniform(0.8, 1.2, 2))) for rate in rates]
    result = SensitivityResult("layer_0", 1.5, 0.5, {"turboquant": points, "kivi": [p._replace(keys=p.keys / 2, values=p.values / 2) for p in points]})
    logs = np.log([(p.keys + p.values) / 2 for p in points])
    slope, intercept = np.polyfit(rates, logs, 1)
    curve = fit_distortion_curve({"layer_0": result})["layer_0"]
    assert curve.beta == pytest.approx(-slope) and curve.alpha == pytest.approx(np.exp(intercept) * (1.5**2 + 0.5**2) / 2)
    assert curve.r_squared == pytest.approx(np.corrcoef(rates, logs)[0, 1] ** 2)
    assert fit_distortion_curve({"layer_0": result}, quantizer="kivi")["layer_0"].alpha == pytest.approx(curve.alpha / 2)
    assert fit_distortion_curve({"layer_0": result}, [1.0, 2.0])["layer_0"].beta == pytest.approx(logs[0] - logs[2])


def test_allocation_is_the_best_there_is():
    rng = np.random.default_rng(1)
    for target in (1.0, 1.75, 2.0, 2.6, 4.0):
        curves = {f"layer_{i}": DistortionCurve(f"layer_{i}", alpha, beta) for i, (alpha, beta) in enumerate(rng.uniform([0.1, 0.8], [3, 1.4], (5, 2)))}
        fits = [bits for bits in itertools.product(range(1, 5), repeat=5) if sum(bits) <= 5 * target]
        cost = [sum(curve(b) for curve, b in zip(curves.values(), bits)) for bits in fits]
        assert tuple(allocate_bits_ratequant(curves, target).values()) == fits[int(np.argmin(cost))]
    same = {f"layer_{i}": DistortionCurve(f"layer_{i}", 1.0, 1.2) for i in range(3)}
    assert list(allocate_bits_ratequant(same, 5 / 3).values()) == [2, 2, 1]
    assert list(allocate_bits_ratequant(same, 5, min_bits=5, max_bits=6).values()) == [5, 5, 5]


# The same numbers whatever runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def live_probe(demo, words):
    return calibrate_layer_sensitivities(*demo, **PROBE, seed=7, text=words)


def test_live_model_folder_and_program_say_the_same(live_probe, demo, demo_model, words, text_file, run):
    folder = calibrate_layer_sensitivities(demo_model, None, **PROBE, seed=7, text=text_file)
    close(folder, live_probe)
    done = run("sensitivity", demo_model, "--json", "--samples", 3, "--length", 64, "--seed", 7, "--text", text_file)
    assert done.returncode == 0, done.stderr
    program = {}
    for name, result in json.loads(done.stdout).items():
        points = {quantizer: [DistortionPoint(**point) for point in found] for quantizer, found in result.pop("distortions").items()}
        program[name] = SensitivityResult(**result, distortions=points)
    close(program, live_probe)
    allocations = [allocate_bits_ratequant(fit_distortion_curve(found)) for found in (live_probe, folder, program)]
    assert allocations[0] == allocations[1] == allocations[2]


def test_own_text_is_the_same_live_and_from_the_folder(demo, demo_model, run):
    live = calibrate_layer_sensitivities(*demo, **PROBE)
    close(calibrate_layer_sensitivities(str(demo_model), None, **PROBE), live)
    program = json.loads(run("sensitivity", demo_model, "--json", "--samples", 3, "--length", 64).stdout)
    assert [r["mean_sensitivity"] for r in program.values()] == pytest.approx([r.mean_sensitivity for r in live.values()], rel=SAME_NUMBERS)


def test_own_code_and_engine_say_the_same(live_probe, demo, words, own_code):
    own = calibrate_layer_sensitivities(*demo, **PROBE, seed=7, text=words)
    close(own, live_probe)
    assert allocate_bits_ratequant(fit_distortion_curve(own)) == allocate_bits_ratequant(fit_distortion_curve(live_probe))


def squared_error(keys, factors, codebooks):
    total = 0
    for layer, own, codebook in zip(keys, factors, codebooks, strict=True):
        transformed = vecinfer.apply_dual_transform_keys(layer, own)
        restored = vecinfer.dequantize_vq(vecinfer.quantize_vq(transformed, codebook), codebook)
        total += np.mean((transformed - restored) ** 2) / np.mean(transformed**2)
    return total / len(keys)


def test_factors_and_codebooks_agree(demo, demo_model, words, keys_of, monkeypatch):
    model, tokenizer = demo
    runs = []
    for where in (demo, (demo_model, None)):
        factors = vecinfer.calibrate_smooth_factors(*where, 4, 128, text=words)
        runs.append((factors, vecinfer.train_codebook(*where, factors, 4, 16, 8, 128, 20, text=words)))
    monkeypatch.setattr("veloxquant_mlx._sources.engine_model", lambda *_, **__: None)
    factors = vecinfer.calibrate_smooth_factors(*demo, 4, 128, text=words)
    runs.append((factors, vecinfer.train_codebook(*demo, factors, 4, 16, 8, 128, 20, text=words)))
    keys = keys_of(model, tokenizer, 512)
    errors = [squared_error(keys, *run) for run in runs]
    for (factors, codebook), error in zip(runs, errors):
        assert factors.shape == (12, 64) and codebook.shape == (12, 8, 16, 8) and factors.dtype == codebook.dtype == np.float32
        np.testing.assert_allclose(factors, runs[0][0], rtol=1e-5)
        assert error == pytest.approx(errors[0], rel=SAME_NUMBERS)
    assert 0 < errors[0] < 0.6


def test_smooth_factors_are_what_mlx_lm_keeps(own_tokenizer, words, keys_of):
    """λᵢ = √max|Kᵢ|, in a family of the engine and in one that it does not have."""
    for name, arguments in (("llama", {}), ("stablelm", FAMILIES["stablelm"])):
        model = live_model(name, **arguments)
        keys = keys_of(model, own_tokenizer, 96)
        expected = np.sqrt(np.abs(keys).max(axis=(1, 2)))
        factors = vecinfer.calibrate_smooth_factors(model, own_tokenizer, 1, 96, text=own_tokenizer.decode(own_tokenizer.encode(words)[:96]))
        np.testing.assert_allclose(factors, expected, rtol=1e-4)


def test_sensitivity_is_output_change_over_noise(own_tokenizer, words):
    """Against a probe written here, with noise of its own; a seed moves either by 8 %."""
    model, layer, length, seeds = live_model("gpt_neox", **FAMILIES["gpt_neox"]), 1, 64, range(16)
    tokens = own_tokenizer.encode(words)[:length]
    text = own_tokenizer.decode(tokens)
    assert own_tokenizer.encode(text) == tokens

    class Noisy(KVCache):
        def update_and_fetch(self, keys, values):
            return super().update_and_fetch(*(x + 0.05 * mx.std(x) * mx.random.normal(x.shape) for x in (keys, values)))

    def probabilities(caches):
        x = model(mx.array([tokens]), cache=caches)[0]
        return x - mx.logsumexp(x, axis=-1, keepdims=True)

    def expected(seed):
        mx.random.seed(seed)
        clean, noisy = (probabilities([KVCache() if i != layer or kind is KVCache else Noisy() for i in range(2)]) for kind in (KVCache, Noisy))
        return np.sqrt(2 * mx.mean(mx.sum(mx.exp(clean) * (clean - noisy), axis=-1)).item()) / 0.05

    def measured(seed):
        probe = calibrate_layer_sensitivities(model, own_tokenizer, 1, length, 0.05, text=text, seed=seed)
        return probe[f"layer_{layer}"].mean_sensitivity

    assert np.mean([measured(seed) for seed in seeds]) == pytest.approx(np.mean([expected(seed) for seed in seeds]), rel=0.1)


def test_noise_scale_hardly_matters_while_small(demo, words):
    small, large = (calibrate_layer_sensitivities(*demo, 2, 64, scale, text=words) for scale in (0.02, 0.1))
    for name in small:
        assert small[name].mean_sensitivity == pytest.approx(large[name].mean_sensitivity, rel=0.25)


def test_seed_and_text_matter(live_probe, demo, words):
    assert calibrate_layer_sensitivities(*demo, **PROBE, seed=7, text=words) == live_probe
    assert calibrate_layer_sensitivities(*demo, **PROBE, seed=8, text=words) != live_probe
    assert calibrate_layer_sensitivities(*demo, **PROBE, seed=7, text=words[500:]) != live_probe


def test_forward_passes_of_own_code(demo, words, own_code, monkeypatch):
    """Every layer is perturbed once, and the clean pass is needed beside."""
    model, tokenizer = demo
    tokens, forward = [], type(model).__call__

    def counted(self, inputs, *args, **kwargs):
        tokens.append(inputs.size)
        return forward(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", counted)
    calibrate_layer_sensitivities(model, tokenizer, 2, 96, text=words)
    assert sum(tokens) / (2 * 96) <= 1.2 * (len(model.layers) + 1)
    tokens.clear()
    vecinfer.calibrate_smooth_factors(model, tokenizer, 2, 96, text=words)
    assert sum(tokens) / (2 * 96) <= 1.2


# What may be given ------------------------------------------------------------------------------------------------------------------


def test_tokenizers_of_every_kind(live_probe, demo, demo_model, own_tokenizer, words):
    model, wrapper = demo
    hugging_face = wrapper._tokenizer

    class Odd:
        def encode(self, text, add_special_tokens=True):
            return hugging_face.encode(text, add_special_tokens=add_special_tokens)

    expected = vecinfer.calibrate_smooth_factors(model, wrapper, 2, 64, text=words)
    for tokenizer in (hugging_face, hugging_face.backend_tokenizer, own_tokenizer, Odd()):
        for where in (model, demo_model):
            np.testing.assert_array_equal(vecinfer.calibrate_smooth_factors(where, tokenizer, 2, 64, text=words), expected)
    assert calibrate_layer_sensitivities(model, own_tokenizer, **PROBE, seed=7, text=words) == live_probe


def test_texts_of_every_kind(demo, words, text_file):
    half = words.index("The captain", len(words) // 2)
    expected = vecinfer.calibrate_smooth_factors(*demo, 2, 64, text=words)
    for text in (text_file, [words], (text_file,)):
        np.testing.assert_array_equal(vecinfer.calibrate_smooth_factors(*demo, 2, 64, text=text), expected)
    parts = vecinfer.calibrate_smooth_factors(*demo, 2, 64, text=[words[:half], words[half:]])
    np.testing.assert_allclose(parts, expected, rtol=0.5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_storage_types_of_the_engine(dtype, own_tokenizer, words, no_warnings):
    model = live_model("llama", dtype)
    before = parameters_of(model)
    found = calibrate_layer_sensitivities(model, own_tokenizer, **PROBE, text=words)
    close(found, calibrate_layer_sensitivities(live_model("llama"), own_tokenizer, **PROBE, text=words), 0.05)
    assert_same_parameters(parameters_of(model), before)


def test_model_in_memory_goes_through_the_engine(own_tokenizer, words, monkeypatch):
    model = live_model("llama")

    def refuse(*_):
        raise AssertionError("by its own code")

    monkeypatch.setattr("veloxquant_mlx._own_forward.OwnForward.__init__", refuse)
    factors = vecinfer.calibrate_smooth_factors(model, own_tokenizer, 2, 32, text=words)
    assert factors.shape == (2, 16)
    vecinfer.train_codebook(model, own_tokenizer, factors, 2, 8, 4, 32, 5, text=words)
    calibrate_layer_sensitivities(model, own_tokenizer, 2, 32, text=words)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_the_engine_lacks(name, demo, words, no_warnings):
    model, tokenizer = live_model(name, mx.bfloat16, **FAMILIES[name]), demo[1]
    before = parameters_of(model)
    sensitivities = calibrate_layer_sensitivities(model, tokenizer, num_samples=2, sequence_length=32, text=words)
    assert list(sensitivities) == ["layer_0", "layer_1"]
    assert all(result.mean_sensitivity > 0 and set(result.distortions) == {"turboquant", "kivi", "affine"} for result in sensitivities.values())
    assert sum(allocate_bits_ratequant(fit_distortion_curve(sensitivities)).values()) == 4
    factors = vecinfer.calibrate_smooth_factors(model, tokenizer, 2, 32, text=words)
    codebook = vecinfer.train_codebook(model, tokenizer, mx.array(factors), 2, 8, 4, 32, 5, text=words)
    assert factors.shape == (2, 16) and np.all(factors > 0)
    assert codebook.shape == (2, 4, 8, 4) and isinstance(codebook, mx.array) and mx.all(mx.isfinite(codebook)).item()
    assert_same_parameters(parameters_of(model), before)


def test_own_text_of_a_family_that_the_engine_lacks(demo):
    model = live_model("olmo2", **FAMILIES["olmo2"])
    first, again, other = (calibrate_layer_sensitivities(model, demo[1], 2, 24, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("name", ["cohere2", "exaone4", "gpt_oss"])
def test_windows_of_layers_that_slide_are_seen(name, own_tokenizer, words):
    """Our caches keep every token, and the model says what it says with its own, which drop those that the window of 8 has passed."""
    from veloxquant_mlx._own_forward import OwnForward, PerturbingCache

    model = live_model(name, **FAMILIES[name])
    tokens = mx.array([own_tokenizer.encode(words)[:48]])
    expected = np.array(model(tokens))
    ours = OwnForward(model, own_tokenizer, "cpu").forward(tokens, [PerturbingCache((0.0, 0.0), (1, 2)) for _ in range(2)])
    np.testing.assert_allclose(np.array(ours), expected, atol=1e-4)
    one_by_one, caches = [], make_prompt_cache(model)
    for i in range(48):
        one_by_one.append(np.array(model(tokens[:, i : i + 1], cache=caches)))
    np.testing.assert_allclose(np.concatenate(one_by_one, 1), expected, atol=1e-3)


def test_parameters_are_put_back_after_an_error(own_tokenizer, words, monkeypatch):
    model = live_model("olmo2", mx.bfloat16, **FAMILIES["olmo2"])
    before, forward, calls, types = parameters_of(model), type(model).__call__, [], set()

    def breaks(self, *args, **kwargs):
        calls.append(1)
        types.add(model.model.embed_tokens.weight.dtype)
        if len(calls) > 3:
            raise problem
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", breaks)
    for problem in (ZeroDivisionError("mine"), KeyboardInterrupt()):
        calls.clear()
        with pytest.raises(type(problem)):
            calibrate_layer_sensitivities(model, own_tokenizer, 2, 32, text=words)
        assert_same_parameters(parameters_of(model), before)
    assert mx.float32 in types


def test_model_that_says_something_else_than_its_family(own_tokenizer, words):
    """A class of one's own on top of llama's: what counts is what it says."""
    model = live_model("llama")

    class Sharper(type(model)):
        def __call__(self, *args, **kwargs):
            return 3 * super().__call__(*args, **kwargs)

    plain = calibrate_layer_sensitivities(model, own_tokenizer, 2, 32, text=words)
    model.__class__ = Sharper
    with pytest.warns(UserWarning, match="its own code") as caught:
        sharper = calibrate_layer_sensitivities(model, own_tokenizer, 2, 32, text=words)
    assert {w.filename for w in caught if "its own code" in str(w.message)} == {__file__}  # where the call stands
    assert all(sharper[name].mean_sensitivity > 1.5 * plain[name].mean_sensitivity for name in plain)


# Arrays against NumPy ---------------------------------------------------------------------------------------------------------------

KINDS = [np.array, mx.array]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("d", [1, 2, 8, 64, 128])
def test_walsh_hadamard_is_orthonormal(d):
    matrix = vecinfer.walsh_hadamard_matrix(d)
    assert matrix.shape == (d, d) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(d), rtol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (2, 3, 4)])
def test_dual_transform_keeps_inner_products(kind, shape):
    keys, queries, factors = random(*shape, 64), random(*shape, 64, seed=1), np.exp(random(64, seed=2))
    k = vecinfer.apply_dual_transform_keys(kind(keys), kind(factors))
    q = vecinfer.apply_dual_transform_queries(kind(queries), kind(factors))
    assert type(k) is type(q) is type(kind(keys)) and k.shape == q.shape == keys.shape
    matrix = vecinfer.walsh_hadamard_matrix(64)
    np.testing.assert_allclose(np.array(k), keys / factors @ matrix, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(q), queries * factors @ matrix, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.sum(np.array(q) * np.array(k), -1), np.sum(queries * keys, -1), atol=1e-4 * np.sqrt(64) * 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (33,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("centroids, code_type", [(2, "uint8"), (200, "uint8"), (256, "uint8"), (257, "uint16"), (1024, "uint16")])
def test_codes_are_nearest_centroids(kind, shape, centroids, code_type):
    vectors, codebook = random(*shape, 24), random(6, centroids, 4, seed=1)
    codes = vecinfer.quantize_vq(kind(vectors), kind(codebook))
    assert type(codes) is type(kind(vectors)) and codes.shape == (*shape, 6) and str(codes.dtype).endswith(code_type)
    pieces = vectors.reshape(*shape, 6, 1, 4)
    distances = np.sum((pieces.astype(np.float64) - codebook) ** 2, -1)
    codes = np.array(codes)
    chosen = np.take_along_axis(distances, codes[..., None].astype(np.int64), -1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-4, atol=1e-5)

    restored = vecinfer.dequantize_vq(kind(codes), kind(codebook))
    assert type(restored) is type(kind(vectors))
    expected = codebook[np.arange(6), codes.astype(np.int64)].reshape(*shape, 24)
    np.testing.assert_array_equal(np.array(restored), expected)
    for dtype in (np.uint16, np.int32, np.int64):
        np.testing.assert_array_equal(vecinfer.dequantize_vq(codes.astype(dtype), codebook), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_sums_of_the_table_are_scores(kind, shape):
    queries, keys, codebook = random(*shape, 32), random(50, 32, seed=1), random(4, 16, 8, seed=2)
    table = vecinfer.compute_query_lut(kind(queries), kind(codebook))
    assert type(table) is type(kind(queries)) and table.shape == (*shape, 4, 16)
    codes = vecinfer.quantize_vq(keys, codebook)
    scores = np.sum(np.array(table)[..., np.arange(4), codes.astype(np.int64)], -1)
    np.testing.assert_allclose(scores, queries @ vecinfer.dequantize_vq(codes, codebook).T, atol=1e-4)


def test_arrays_of_other_types_and_layouts():
    keys, factors, codebook = random(6, 64), np.exp(random(64, seed=1)), random(8, 16, 8, seed=2)
    expected = vecinfer.apply_dual_transform_keys(keys, factors)
    for other in (keys.astype(np.float64), np.asfortranarray(keys), keys[::-1].copy()[::-1], np.repeat(keys, 2, axis=0)[::2]):
        np.testing.assert_array_equal(vecinfer.apply_dual_transform_keys(other, factors), expected)
    for dtype, tolerance in ((np.float16, 1e-2), (mx.float16, 1e-2), (mx.bfloat16, 1e-1)):
        other = keys.astype(dtype) if dtype is np.float16 else mx.array(keys).astype(dtype)
        np.testing.assert_allclose(np.array(vecinfer.apply_dual_transform_keys(other, factors)), expected, atol=tolerance)
    assert isinstance(vecinfer.quantize_vq(keys, mx.array(codebook)), np.ndarray)
    assert isinstance(vecinfer.quantize_vq(mx.array(keys), codebook), mx.array)
    assert vecinfer.quantize_vq(np.zeros((0, 64), np.float32), codebook).shape == (0, 8)
    np.testing.assert_array_equal(keys, random(6, 64))


# Bad input --------------------------------------------------------------------------------------------------------------------------


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


# Plans ------------------------------------------------------------------------------------------------------------------------------

QUICK = dict(bits=2.5, method="turboquant", num_samples=2, sequence_length=48)


@pytest.fixture(scope="session")
def live_plan(demo):
    return veloxquant_mlx.calibrate(*demo, **QUICK)


def test_plan_of_a_live_model_is_that_of_its_folder(live_plan, demo, demo_model, run, tmp_path):
    assert isinstance(live_plan, Plan)
    assert live_plan == veloxquant_mlx.calibrate(demo_model, **QUICK)
    assert live_plan != veloxquant_mlx.calibrate(*demo, **QUICK, seed=1)
    assert live_plan != "a plan"
    live_plan.save(tmp_path / "live.plan")
    done = run("verify", tmp_path / "live.plan", "--model", demo_model)
    assert done.returncode == 0, done.stderr
    done = run("calibrate", demo_model, "--method", "turboquant", "--bits", 2.5, "--samples", 2, "--length", 48, "-o", tmp_path / "program.plan")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "program.plan").read_bytes() == (tmp_path / "live.plan").read_bytes()


def test_plan_of_the_best_method(demo, demo_model, text_file, run, tmp_path):
    plan = veloxquant_mlx.calibrate(*demo, num_samples=2, sequence_length=96, text=text_file, window=16)
    bits, kl = np.transpose(plan.frontier)
    assert len(bits) > 10 and np.all(np.diff(bits) > 0) and np.all(np.diff(kl) <= 0)
    assert plan.bits == pytest.approx(2, abs=0.01) and plan.predicted_kl == pytest.approx(np.interp(2, bits, kl), rel=0.2)
    assert plan.constant_bytes > 0 and len(plan.units) == 12 * 2 * 2
    assert plan.provenance["texts"][0]["name"] == text_file.name and plan.provenance["method"] == "rotated_pq"
    path = tmp_path / "a.plan"
    plan.save(path)
    assert run("verify", path, "--model", demo_model).returncode == 0
    done = run("calibrate", demo_model, "--samples", 2, "--length", 96, "--text", text_file, "--window", 16, "-o", tmp_path / "b.plan")
    assert done.returncode == 0, done.stderr
    assert Plan.load(tmp_path / "b.plan") == plan == Plan.load(path)
    assert path.read_bytes() == (tmp_path / "b.plan").read_bytes()


def test_plan_within_bytes_and_by_parts(demo, words):
    some = dict(num_samples=2, sequence_length=96, text=words)
    plan = veloxquant_mlx.calibrate(*demo, bytes=1_000_000, context=1024, units="kv", keys="plane", window=8, sinks=2, **some)
    assert plan.cache_bytes(1024) <= 1_000_000
    codes = {}
    for unit in plan.units:
        codes.setdefault((unit["layer"], unit["side"]), set()).add(unit["codes"])
    assert len(codes) == 24 and all(len(widths) == 1 for widths in codes.values())  # heads of a side share a width
    assert plan.provenance["context"] == 1024


@pytest.mark.parametrize("method", ["turboquant", "rotated_pq"])
@pytest.mark.parametrize("name", FAMILIES)
def test_plans_of_families_that_the_engine_lacks(name, method, demo, words, run, tmp_path, no_warnings):
    model = live_model(name, mx.bfloat16, **FAMILIES[name])
    before = parameters_of(model)
    layers = list(model.layers)
    options = dict(bits=2.5, method=method, num_samples=8, sequence_length=64, context=256, text=words)
    if name == "gpt_oss":
        with pytest.raises(ValueError, match="sinks"):
            veloxquant_mlx.calibrate(model, demo[1], **options)
    else:
        plan = veloxquant_mlx.calibrate(model, demo[1], **options, sliding="quantize")
        assert plan.model["architecture"] == name and plan.bits <= 2.501 and plan.predicted_kl > 0
        assert {unit["layer"] for unit in plan.units} == {0, 1}
        plan.save(tmp_path / "plan")
        assert run("verify", tmp_path / "plan").returncode == 0
    assert_same_parameters(parameters_of(model), before)
    assert all(one is other for one, other in zip(model.layers, layers, strict=True))


@pytest.mark.slow
def test_plan_by_own_code_is_that_of_the_engine(demo, words, own_code, monkeypatch):
    options = dict(num_samples=2, sequence_length=96, text=words)
    own = veloxquant_mlx.calibrate(*demo, **options)
    monkeypatch.undo()
    engine = veloxquant_mlx.calibrate(*demo, **options)
    assert own.predicted_kl == pytest.approx(engine.predicted_kl, rel=SAME_NUMBERS)
    assert np.mean([a["bits"] != b["bits"] for a, b in zip(own.units, engine.units)]) < 0.2


def test_plan_reads_and_writes_files(live_plan, tmp_path, run):
    for path in (tmp_path / "a.plan", str(tmp_path / "b.plan")):
        live_plan.save(path)
        assert Plan.load(path) == live_plan
    assert Plan.load(tmp_path / "a.plan").frontier is None
    assert run("inspect", tmp_path / "a.plan").stdout.strip() == live_plan.summary().strip()
    described = json.loads(run("inspect", tmp_path / "a.plan", "--json").stdout)
    assert described["effective_bits"] == live_plan.bits == live_plan.effective_bits(2048) == 2.5
    assert described["predicted_kl"] == live_plan.predicted_kl > 0 and described["model"] == live_plan.model
    assert live_plan.cache_bytes(1000) == 1000 * 12 * 2 * 2 * 64 * 2.5 / 8
    with pytest.raises(RuntimeError, match="nowhere"):
        live_plan.save(tmp_path / "nowhere" / "a.plan")
    data = bytearray((tmp_path / "a.plan").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.plan").write_bytes(data)
    for name in ("damaged.plan", "missing.plan"):
        with pytest.raises(RuntimeError, match=name):
            Plan.load(tmp_path / name)
    for wrong in (3, None):
        with pytest.raises(TypeError):
            Plan.load(wrong)
        with pytest.raises(TypeError):
            live_plan.save(wrong)


def test_plan_is_a_table(live_plan):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(live_plan.units)
    assert len(table) == 24 and {"layer", "side", "bits", "method"} <= set(table.columns)
    assert table.bits.dtype.kind in "if" and set(table.side) == {"keys", "values"} and set(table.method) == {"turboquant"}
    assert table.groupby("layer").bits.mean().mean() + 0.25 == 2.5
    assert repr(live_plan).startswith("Plan(qwen2, turboquant, 2.5 bits")


def test_plan_of_a_changed_model_is_not_for_the_folder(demo_model, own_tokenizer):
    """Arrays of another type are another model's weights; the hash says no more than the headers do."""
    model, tokenizer = mlx_lm.load(str(demo_model))
    model.set_dtype(mx.float16)
    plan = veloxquant_mlx.calibrate(model, tokenizer, **QUICK)
    assert plan.model["config_hash"] and not plan.model["weights_hash"]


@pytest.mark.parametrize("options, pattern", [
    (dict(bits=0), "bits.*0"), (dict(bits=float("nan")), "bits.*nan"), (dict(bits="2"), "bits.*'2'"), (dict(method="best"), "best.*turboquant"),
    (dict(method=2), "method.*int"), (dict(units="all"), 'units.*"all"'), (dict(units=3), "units.*(int|3)"), (dict(keys="all"), 'keys.*"all"'),
    (dict(keys=3), "keys.*(int|3)"), (dict(sliding="no"), 'sliding.*"no"'), (dict(window=-1), "window.*-1"), (dict(sinks=1.5), "sinks.*1.5"),
    (dict(bytes=0), "bytes.*0"), (dict(context=-1), "context.*-1"), (dict(num_samples=-1), "num_samples.*-1"), (dict(device="tpu"), "device.*tpu"),
    (dict(seed="a"), "seed.*a"), (dict(sequence_length=4000), "2048.*4000"), (dict(text=[1]), "text.*int"), (dict(quality=1), "quality"),
], ids=lambda value: str(value)[:40])
def test_wrong_options_of_plans_are_explained(options, pattern, demo):
    with pytest.raises((ValueError, TypeError)) as caught:
        veloxquant_mlx.calibrate(*demo, **{**QUICK, **options})
    assert re.search(pattern, str(caught.value), re.DOTALL), caught.value
    assert "incompatible function arguments" not in str(caught.value)


# Manners ----------------------------------------------------------------------------------------------------------------------------


def python(code, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(MODULE)}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120, **options)


IMPORTS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {first}
    import veloxquant_mlx
    import mlx.core as mx
before = veloxquant_mlx._load.core.gemm_calls()
x = mx.ones((64, 64))
mx.eval(x @ x)
print(len([w for w in caught if "veloxquant_mlx" in str(w.message)]), veloxquant_mlx._load.core.gemm_calls() > before)
print(*[w.filename for w in caught if "veloxquant_mlx" in str(w.message)])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX brings another BLAS here")
@pytest.mark.parametrize("first, warned", [
    ("", 0), ("import mlx.core as mx", 0), ("import mlx.core as mx; mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))", 1),
], ids=["first", "after mlx", "after a product"])
def test_order_of_imports(first, warned):
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("products are the GPU's")
    done = python(IMPORTS.format(first=first))
    assert done.returncode == 0, done.stderr
    counts, files = done.stdout.splitlines()
    assert counts in ("0 True", f"{warned} {not warned}")
    assert set(files.split()) <= {"<string>"}  # where the import stands, not inside the module


def test_no_gpu_is_said_once(demo_model):
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("there is a GPU")
    done = python("""
import sys, warnings
import veloxquant_mlx
from veloxquant_mlx.allocators import vecinfer
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    vecinfer.calibrate_smooth_factors(sys.argv[1], None, 2, 8, device="cpu")
    assert not caught, [str(w.message) for w in caught]
    for _ in range(2):
        vecinfer.calibrate_smooth_factors(sys.argv[1], None, 2, 8)
print([(str(w.message), w.category.__name__) for w in caught])
""", demo_model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("UserWarning") == 1 and "GPU" in done.stdout


INTERRUPTED = """
import sys, time, warnings
import veloxquant_mlx
import mlx_lm
from veloxquant_mlx.allocators import ratequant
warnings.simplefilter("ignore")
model, tokenizer = mlx_lm.load(sys.argv[1])
if sys.argv[3] == "own code":
    veloxquant_mlx._sources.engine_model = lambda *_, **__: None
print("ready", flush=True)
try:
    if sys.argv[3] == "own code":
        ratequant.calibrate_layer_sensitivities(model, tokenizer, 20, 512, text=sys.argv[2] * 8)
    else:
        veloxquant_mlx.calibrate(model, tokenizer, 3.0, num_samples=20, sequence_length=512, text=sys.argv[2] * 8).save("made.plan")
except KeyboardInterrupt:
    print(time.time(), flush=True)
"""


@pytest.mark.parametrize("what, after", [("plan", 1.5), pytest.param("plan", 5, marks=pytest.mark.slow), ("own code", 1.5)])
def test_interrupt_ends_a_calibration(what, after, demo_model, words, tmp_path):
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-c", INTERRUPTED, demo_model, words, what]
    environment = {**os.environ, "PYTHONPATH": str(MODULE), "TMPDIR": str(scratch)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=work, env=environment)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(after)
        sent = time.time()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert float(out) - sent < 2  # about one, where the machine has nothing else to do
    assert list(work.iterdir()) == [] and [path.name for path in scratch.iterdir() if path.name != "mlx"] == []  # mlx: what MLX compiled


def test_other_threads_go_on(demo, words):
    ticks, ended = [], threading.Event()

    def tick():
        while not ended.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    try:
        calibrate_layer_sensitivities(*demo, 4, 256, text=words)
    finally:
        elapsed = time.monotonic() - begin
        ended.set()
        thread.join()
    assert elapsed > 0.3
    assert len(ticks) > 50 * elapsed and np.max(np.diff(ticks)) < max(0.2, elapsed / 4)


def test_progress_is_shown_where_asked(demo, words, capfd):
    calibrate_layer_sensitivities(*demo, 2, 32, text=words)
    assert capfd.readouterr() == ("", "")
    calibrate_layer_sensitivities(*demo, 2, 32, text=words, progress=True)
    shown = capfd.readouterr()
    assert "perturbing layers" in shown.err and shown.out == ""


def public_functions():
    functions = [getattr(module, name) for module in (veloxquant_mlx, ratequant, vecinfer) for name in module.__all__]
    return [f for f in functions if inspect.isfunction(f)]


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f.__name__)
def test_functions_have_help(function):
    """What every parameter is, what comes back, and what goes wrong."""
    help = pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert function.__name__ in help
    documentation = inspect.getdoc(function)
    elsewhere = "those of" in documentation or "as in" in documentation
    for name in inspect.signature(function).parameters:
        assert elsewhere or re.search(rf"\b{name}\b|\b{name[0].upper()}\b", documentation), name
    assert re.search(r"\bReturns?\b|→|\[", documentation)  # a shape
    assert "Raises" in documentation


@pytest.mark.parametrize(
    "thing", [veloxquant_mlx, ratequant, vecinfer, Plan, SensitivityResult, DistortionCurve, DistortionPoint, veloxquant_mlx.Tokenizer], ids=lambda t: t.__name__
)
def test_modules_and_classes_have_help(thing):
    documentation = inspect.getdoc(thing)
    assert len(documentation) > 40 and documentation.splitlines()[0] in pydoc.render_doc(thing, renderer=pydoc.plaintext)
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        if not name.startswith("_") and (callable(member) or isinstance(member, (property, staticmethod))):
            assert inspect.getdoc(getattr(thing, name)) or name in documentation, name


# The notebook -----------------------------------------------------------------------------------------------------------------------

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_notebook_is_clean():
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert str(ROOT) not in NOTEBOOK.read_text()


def test_notebook_runs(tmp_path, demo_model, monkeypatch):
    shutil.copy(NOTEBOOK, tmp_path)
    (tmp_path / "demo").symlink_to(demo_model)
    monkeypatch.setenv("PYTHONPATH", str(MODULE))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    data = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in one for one in data) >= 3 and any("text/html" in one for one in data)
