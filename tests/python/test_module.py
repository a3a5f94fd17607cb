"""The Python module: the documented calls on live models and folders, against the program, MLX and NumPy."""
import copy
import inspect
import itertools
import json
import pickle

import numpy as np
import pytest

pytest.importorskip("veloxquant_mlx", reason="the Python module is not built", exc_type=ModuleNotFoundError)

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import KVCache, make_prompt_cache
from veloxquant_mlx.allocators import ratequant, vecinfer
from veloxquant_mlx.allocators.ratequant import (
    DistortionCurve,
    DistortionPoint,
    SensitivityResult,
    allocate_bits_ratequant,
    calibrate_layer_sensitivities,
    fit_distortion_curve,
)

from live_models import FAMILIES, assert_same_parameters, live_model, parameters_of
from made_by_hand import by_hand, random

# The same arithmetic by other code: relative.
SAME_NUMBERS = 0.01

PROBE = dict(num_samples=3, sequence_length=64)


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
