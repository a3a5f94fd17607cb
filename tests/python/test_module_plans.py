"""Plans made, kept and shown by the Python module."""
import json
import re

import numpy as np
import pytest

pytest.importorskip("veloxquant_mlx", reason="the Python module is not built", exc_type=ModuleNotFoundError)

import veloxquant_mlx
import mlx.core as mx
import mlx_lm
from veloxquant_mlx import Plan

from live_models import FAMILIES, assert_same_parameters, live_model, parameters_of

# The same arithmetic by other code: relative.
SAME_NUMBERS = 0.01

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
