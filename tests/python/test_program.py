"""The program as a person meets it: commands, JSON, exit status, one-line errors, nothing half-written."""
import json
import os
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import convert

from command_line import change_config, fails
from tiny_models import write_model


# What works ------------------------------------------------------------------------------------------------------------------------


def test_help_has_examples_and_version_names_blas(run):
    assert "OpenBLAS" in run("--version").stdout
    for command in "calibrate sensitivity allocate inspect verify evaluate generate".split():
        done = run(command, "--help")
        assert done.returncode == 0 and "Example: veloxquant " + command in done.stdout


@pytest.mark.skipif(" avx2 " not in Path("/proc/cpuinfo").read_text(), reason="SSE is what this processor has")
def test_a_product_for_an_older_processor_is_said_once(run, demo_model, text):
    command = ["sensitivity", demo_model, "--samples", 1, "--length", 32, "--text", text, "--json"]
    done = run(*command, env={**os.environ, "OPENBLAS_CORETYPE": "Prescott"})
    assert done.returncode == 0
    (line,) = (line for line in done.stderr.splitlines() if "OpenBLAS" in line)
    assert line.startswith("veloxquant: warning: OpenBLAS multiplies with SSE") and line.endswith("unset OPENBLAS_CORETYPE, which is Prescott")
    own = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    assert "OpenBLAS" not in run(*command, env=own).stderr


def test_probe_saved_and_allocated_without_a_model(run, demo_model, text, tmp_path):
    done = run("sensitivity", demo_model, "--samples", 2, "--length", 64, "--text", text, "--json")
    assert done.returncode == 0, done.stderr
    probe = json.loads(done.stdout)
    assert list(probe) == [f"layer_{i}" for i in range(12)]
    for name, layer in probe.items():
        assert layer["layer_name"] == name and layer["mean_sensitivity"] > 0 and layer["std_sensitivity"] >= 0
        assert set(layer["distortions"]) == {"turboquant", "kivi", "affine"}
        assert [point["rate"] for point in layer["distortions"]["turboquant"]] == [1, 1.5, 2, 3, 4]
    saved = tmp_path / "sensitivities.json"
    saved.write_text(done.stdout)
    for quantizer in ("turboquant", "kivi", "affine"):
        done = run("allocate", saved, "--bits", 2.5, "--quantizer", quantizer, "--json")
        assert done.returncode == 0, done.stderr
        bits = json.loads(done.stdout)
        assert list(bits) == list(probe) and sum(bits.values()) == 30 and set(bits.values()) <= {1, 2, 3, 4}
    assert "layer_11" in run("allocate", saved).stdout
    # three documented fields are enough
    bare = {k: {f: v[f] for f in ("layer_name", "mean_sensitivity", "std_sensitivity")} for k, v in probe.items()}
    saved.write_text(json.dumps(bare))
    assert sum(json.loads(run("allocate", saved, "--json").stdout).values()) == 24


def test_plan_is_described_verified_and_evaluated(run, demo_model, text, plan):
    described = json.loads(run("inspect", plan, "--json").stdout)
    assert described["effective_bits"] == 1 and described["constant_bytes"] > 12 * 2 * 256 * 64 * 4
    assert described["provenance"]["texts"][0]["name"] == text.name
    assert "layer_11" in run("inspect", plan).stdout
    assert run("verify", plan).returncode == 0
    assert json.loads(run("verify", plan, "--model", demo_model, "--json").stdout)["ok"] is True
    done = run("evaluate", demo_model, "--plan", plan, "--peer", "mlx4", "--peer", "kivi2", "--text", text, "--windows", 2, "--length", 448, "--recall", 2, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["storage"] for row in rows] == ["full", plan.name, "mlx4", "kivi2"]
    for row in rows:
        measures = {"perplexity", "perplexity_change", "kl_mean", "kl_median", "kl_p99", "kl_p999", "kl_max", "top1"}
        measures |= {f"{name}_error" for name in measures}
        assert set(row) == measures | {"storage", "effective_bits", "bits_at", "constant_bytes", "sliding_bytes", "recall", "recall_second", "differences", "kl_sampling_error",
                                       "windows", "length", "score_from", "step"}
        assert (row["windows"], row["length"], row["score_from"], row["step"]) == (2, 448, 0, 0)
        others = [other for other in rows if other is not row]
        assert [difference["storage"] for difference in row["differences"]] == [other["storage"] for other in others]
        for difference, other in zip(row["differences"], others):
            assert set(difference) == measures | {"storage"}
            assert difference["kl_mean"] == pytest.approx(row["kl_mean"] - other["kl_mean"], abs=1e-12)
    assert rows[0]["kl_mean"] == 0 and rows[1]["effective_bits"] == 1 and rows[2]["effective_bits"] == 4.5
    assert rows[1]["kl_mean"] > rows[3]["kl_mean"] > rows[2]["kl_mean"] > 0


def test_same_seed_same_plan(run, demo_model, tmp_path):
    def make(name, seed, threads):
        command = ["calibrate", demo_model, "--method", "turboquant", "--bits", 2.5, "--units", "layer", "--samples", 2, "--length", 48]
        done = run(*command, "--seed", seed, "-o", tmp_path / name, preexec_fn=lambda: os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads])))
        assert done.returncode == 0, done.stderr
        return (tmp_path / name).read_bytes()

    first = make("a", 3, 2)
    assert first == make("b", 3, 1)
    assert first != make("c", 4, 2)


def test_own_text_is_the_default(run, demo_model):
    rows = json.loads(run("evaluate", demo_model, "--peer", "mlx8", "--windows", 1, "--length", 32, "--json").stdout)
    assert rows[1]["kl_mean"] < 0.05 and rows[0]["recall"] is None


def test_plan_of_what_needs_no_samples(run, demo_model, tmp_path):
    """Scalar quantizers of one width are the same whatever the model reads, so that nothing is read, and the plan says so."""
    plan = tmp_path / "kivi.plan"
    done = run("calibrate", demo_model, "--method", "kivi", "--units", "uniform", "--bits", 3, "--context", 1000, "-o", plan, "--json", timeout=20)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)["provenance"]
    assert made["num_samples"] == made["sequence_length"] == 0 and made["texts"] == [] and made["context"] == 1000
    assert "without samples" in run("inspect", plan).stdout and "1000 tokens" in run("inspect", plan).stdout


def test_large_heads(run, tmp_path, demo_model):
    folder = write_model(tmp_path / "large", "llama", vocab_size=8192, head_dim=2048, num_hidden_layers=1)
    shutil.copy(demo_model / "tokenizer.json", folder)
    plan = tmp_path / "large.plan"
    done = run("calibrate", folder, "--method", "turboquant", "--units", "uniform", "--bits", 3, "-o", plan)
    assert done.returncode == 0, done.stderr
    assert run("verify", plan, "--model", folder).returncode == 0


def test_weights_of_any_name(run, tiny, text):
    (tiny / "model.safetensors").rename(tiny / "weights.safetensors")
    assert evaluate(run, tiny, text).returncode == 0


def test_names_need_not_be_utf8(run, demo_model, text, plan, tmp_path):
    book, copy = (os.path.join(os.fsencode(tmp_path), name) for name in (b"t\xe9.txt", b"pl\xe9.plan"))
    shutil.copy(text, book)
    shutil.copy(plan, copy)
    book, copy = os.fsdecode(book), os.fsdecode(copy)
    done = run("evaluate", demo_model, "--plan", copy, "--text", book, "--windows", 1, "--length", 16, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)[1]["storage"] == "pl\ufffd.plan", done.stderr
    assert json.loads(run("verify", copy, "--json").stdout)["ok"] is True
    done = run("calibrate", demo_model, "--method", "vecinfer", "--bits", 0.125, "--samples", 2, "--length", 64, "--text", book, "-o", copy, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["provenance"]["texts"][0]["name"] == "t\ufffd.txt", done.stderr


def test_every_command_takes_device_and_seed(run, plan, tmp_path):
    saved = tmp_path / "s.json"
    saved.write_text(json.dumps({"layer_0": {"layer_name": "layer_0", "mean_sensitivity": 1.0, "std_sensitivity": 0.1}}))
    for command in (["inspect", plan], ["verify", plan], ["allocate", saved]):
        assert run(*command, "--device", "cpu", "--seed", 7).returncode == 0
        assert run(*command, "--device", "tpu").returncode == 2
        assert "no effect" in run(command[0], "--help").stdout


def test_affine_plan_equals_the_mlx_peer(run, demo_model, text, tmp_path):
    """Our packed affine codes against mx.quantize itself, in what the model makes of them."""
    plan = tmp_path / "affine.plan"
    done = run("calibrate", demo_model, "--method", "affine", "--units", "uniform", "--bits", 3.5, "--samples", 1, "--length", 32, "--text", text, "-o", plan)
    assert done.returncode == 0, done.stderr
    done = run("evaluate", demo_model, "--plan", plan, "--peer", "mlx3", "--text", text, "--windows", 3, "--length", 256, "--json")
    _, ours, theirs = json.loads(done.stdout)
    assert ours["effective_bits"] == theirs["effective_bits"] == 3.5
    assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"], rel=0.05)


@pytest.fixture(scope="module")
def best_plan(run, demo_model, text, tmp_path_factory):
    """A plan of the default method from few samples, and what calibrate said."""
    path = tmp_path_factory.mktemp("best") / "best.plan"
    done = run("calibrate", demo_model, "--bits", 1.5, "--samples", 3, "--length", 256, "--text", text, "--frontier", "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    return path, json.loads(done.stdout)


def test_calibrate_gives_each_head_a_width(best_plan, run, demo_model, text):
    path, made = best_plan
    assert made["window"] == 32 and made["sinks"] == 4 and made["provenance"]["units"] == "head"
    assert [(u["layer"], u["side"], u["head"]) for u in made["units"]] == [(l, s, h) for l in range(12) for s in ("keys", "values") for h in range(2)]
    assert 1.49 < made["effective_bits"] <= 1.5
    assert made["predicted_kl"] == pytest.approx(sum(u["predicted_kl"] for u in made["units"]))
    assert len({u["numbers"]["codes"] for u in made["units"]}) > 2
    frontier = json.loads(path.with_suffix(".frontier.json").read_text())
    assert frontier == made["frontier"] and len(frontier) > 10
    for before, after in zip(frontier, frontier[1:]):
        assert after["bits"] > before["bits"] and after["predicted_kl"] <= before["predicted_kl"]
    done = run("evaluate", demo_model, "--plan", path, "--peer", "mlx2+window", "--text", text, "--windows", 2, "--length", 512,
               "--context", "2k", "--context", 32768, "--json")
    full, ours, theirs = json.loads(done.stdout)
    assert full["bits_at"] == {"2048": 32, "32768": 32}
    assert ours["bits_at"]["2048"] == pytest.approx(made["effective_bits"]) and ours["bits_at"]["32768"] < ours["bits_at"]["2048"] < ours["effective_bits"]
    assert theirs["bits_at"]["2048"] == pytest.approx((36 * 8.5 + 2012 * 2.5) / 2048)
    assert ours["constant_bytes"] == made["constant_bytes"]
    assert 0 < ours["kl_mean"] < theirs["kl_mean"]
    shown = run("inspect", path).stdout
    assert "a width for each head's keys" in shown and "most at stake" in shown and "the last 32 and first 4 tokens at 8 bits" in shown


@pytest.fixture(scope="module")
def sliding_model(demo_model, tmp_path_factory):
    """demo, every third layer of which sees all tokens, the others 100."""
    folder = tmp_path_factory.mktemp("sliding") / "model"
    shutil.copytree(demo_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(12)]
    config["sliding_window"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sliding_layers_stay_full(sliding_model, run, text, tmp_path):
    few = ["--samples", 3, "--length", 256, "--text", text, "--json"]
    path, beside = tmp_path / "full.plan", tmp_path / "quantize.plan"
    made = json.loads(run("calibrate", sliding_model, "--bits", 1.5, "-o", path, *few).stdout)
    assert made["sliding"] == [{"layer": i, "window": 100} for i in range(12) if i % 3 != 2]
    assert {u["layer"] for u in made["units"]} == {2, 5, 8, 11} and 1.49 < made["effective_bits"] <= 1.5
    assert made["sliding_bytes"] == 8 * 100 * 2 * 2 * 64 * 2
    assert made["contexts"]["2048"]["bytes_at_16_bits"] == 4 * 2048 * 2 * 2 * 64 * 2
    shown = run("inspect", path).stdout
    assert "8 layers keep the tokens of their window at full precision" in shown and "full, last 100" in shown
    assert run("verify", path, "--model", sliding_model).returncode == 0
    quantized = json.loads(run("calibrate", sliding_model, "--bits", 1.5, "-o", beside, "--sliding", "quantize", *few).stdout)
    assert quantized["sliding"] == [] and {u["layer"] for u in quantized["units"]} == set(range(12))
    measure = ["evaluate", sliding_model, "--plan", path, "--plan", beside, "--peer", "mlx4", "--text", text]
    rows = json.loads(run(*measure, "--windows", 2, "--length", 512, "--json").stdout)
    assert 0 < rows[1]["kl_mean"] < rows[2]["kl_mean"]
    assert [row["sliding_bytes"] for row in rows] == [0, made["sliding_bytes"], 0, made["sliding_bytes"]]
    shown = run(*measure, "--windows", 1, "--length", 50).stdout  # half a window
    assert "sliding" in shown.splitlines()[0] and shown.count("200.0 KiB") == 2 and "Bits count the layers that are stored" in shown
    documented = json.loads(run("calibrate", sliding_model, "--bits", 2, "--method", "turboquant", "--units", "uniform", "-o", path, "--json").stdout)
    assert {u["layer"] for u in documented["units"]} == {2, 5, 8, 11}


def test_a_model_whose_layers_all_slide(sliding_model, run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sliding_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["sliding_attention"] * 12}))
    for method in ("rotated_pq", "vecinfer"):
        fails(run("calibrate", folder, "-o", tmp_path / "x", "--method", method), "sliding", "all 12 layers", "quantize")
    fails(run("evaluate", folder, "--peer", "mlx4", "--windows", 1, "--length", 64), "mlx4", "all 12 layers")
    # A window that no sequence outgrows is none.
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["sliding_attention"] * 12, "sliding_window": 2048}))
    path = tmp_path / "whole.plan"
    assert json.loads(run("calibrate", folder, "--method", "affine", "--bits", 4.5, "-o", path, "--json").stdout)["sliding"] == []


def test_calibrate_a_packed_model(demo_model, run, text, tmp_path):
    """A 4-bit copy as mlx_lm writes it."""
    folder = tmp_path / "packed"
    convert(str(demo_model), mlx_path=str(folder), quantize=True, q_bits=4)
    path = tmp_path / "x.plan"
    made = json.loads(run("calibrate", folder, "--bits", 1.5, "--samples", 3, "--length", 256, "--text", text, "-o", path, "--json").stdout)
    assert made["effective_bits"] <= 1.5
    rows = json.loads(run("evaluate", folder, "--plan", path, "--text", text, "--windows", 1, "--length", 256, "--json").stdout)
    assert 0 < rows[1]["kl_mean"] < 0.05
    fails(run("verify", path, "--model", demo_model), "another model")


def test_frontier_and_plan_need_two_files(run, demo_model, tmp_path):
    out = tmp_path / "x.plan"
    fails(run("calibrate", demo_model, "-o", out, f"--frontier={tmp_path}/./x.plan"), "--frontier", "another file", out)
    assert not out.exists()
    fails(run("sensitivity", demo_model, "--method", "adjoint", "--noise-scale", 0.1), "--noise-scale", "perturb", "adjoint")


def test_calibrate_to_bytes_at_a_context(run, demo_model, text, tmp_path):
    path = tmp_path / "bytes.plan"
    done = run("calibrate", demo_model, "--bytes", "20MiB", "--context", "64k", "--keys", "plane", "--units", "kv", "--samples", 2, "--length", 128,
               "--text", text, "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["provenance"]["context"] == 65536 and made["provenance"]["units"] == "kv"
    bits = (20 << 20) * 8 / (65536 * 12 * 2 * 2 * 64)
    assert 0.98 * bits < made["effective_bits"] <= bits
    assert all(u["numbers"]["plane"] == (u["side"] == "keys") for u in made["units"])
    for keys, values in zip(made["units"][::2], made["units"][1::2]):
        assert keys["numbers"]["codes"] == values["numbers"]["codes"]  # two heads of one side


def test_adjoint_sensitivities_are_those_of_the_probe(run, demo_model, text, tmp_path):
    few = [demo_model, "--samples", 4, "--length", 256, "--text", text, "--json"]
    adjoint = json.loads(run("sensitivity", *few, "--method", "adjoint", "-o", tmp_path / "s.json").stdout)
    perturbed = json.loads(run("sensitivity", *few).stdout)
    assert len(adjoint["units"]) == 48
    for layer, result in perturbed.items():
        assert adjoint[layer]["mean_sensitivity"] == pytest.approx(result["mean_sensitivity"], rel=0.25)
    for unit in adjoint["units"]:
        costs = [width["predicted_kl"] for width in unit["widths"]]
        assert costs == sorted(costs, reverse=True) and costs[-1] >= 0
    assert run("allocate", tmp_path / "s.json", "--bits", 2).returncode == 0


# Bad input -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["quantize"],
        ["evaluate"],
        ["evaluate", "MODEL", "--peer", "mlx7"],
        ["evaluate", "MODEL", "--windows", "0"],
        ["evaluate", "MODEL", "--windows", "-3"],
        ["evaluate", "MODEL", "--device", "tpu"],
        ["calibrate", "MODEL"],
        ["calibrate", "MODEL", "-o", "x", "--bits", "0"],
        ["calibrate", "MODEL", "-o", "x", "--bits", "nan"],
        ["calibrate", "MODEL", "-o", "x", "--samples", "0"],
        ["calibrate", "MODEL", "-o", "x", "--window", "-1"],
        ["calibrate", "MODEL", "-o", "x", "--sinks", "65537"],
        ["calibrate", "MODEL", "-o", "x", "--bytes", "2 parsecs"],
        ["calibrate", "MODEL", "-o", "x", "--bytes", "2GiB", "--bits", "2"],
        ["calibrate", "MODEL", "-o", "x", "--context", "2m"],
        ["calibrate", "MODEL", "-o", "x", "--keys", "half"],
        ["calibrate", "MODEL", "-o", "x", "--units", "token"],
        ["evaluate", "MODEL", "--context", "0"],
        ["calibrate", "MODEL", "-o", "x", "--method", "gptq"],
        ["sensitivity", "MODEL", "--noise-scale", "-1"],
        ["sensitivity", "MODEL", "--length", "99999999999999999999"],
        ["allocate"],
    ],
)
def test_usage_is_status_2(run, demo_model, arguments):
    done = run(*[demo_model if a == "MODEL" else a for a in arguments])
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.strip() or done.stdout.strip()


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ([], ["expected a command", "calibrate", "evaluate", "got none"]),
        (["foo"], ["expected a command", "calibrate", "evaluate", "got foo"]),
        (["evaluate", "MODEL", "--samples", "3"], ["--samples", "evaluate --help"]),
        (["sensitivity", "MODEL", "--samples", "0"], ["--samples", "whole number from 1 to 2147483647, got 0"]),
        (["sensitivity", "MODEL", "--samples", "99999999999"], ["--samples", "2147483647, got 99999999999"]),
        (["sensitivity", "MODEL", "--length", "1.5"], ["--length", "whole number", "got 1.5"]),
        (["evaluate", "MODEL", "--windows", "0"], ["--windows", "whole number from 1", "got 0"]),
        (["evaluate", "MODEL", "--recall", "0"], ["--recall", "whole number from 1", "got 0"]),
        (["evaluate", "MODEL", "--seed", "-1"], ["--seed", "from 0 to 18446744073709551615, got -1"]),
        (["evaluate", "MODEL", "--seed", "18446744073709551616"], ["--seed", "got 18446744073709551616"]),
        (["calibrate", "MODEL", "-o", "x", "--bits", "two"], ["--bits", "a number above 0, got two"]),
        (["calibrate", "MODEL", "-o", "x", "--context", "-5"], ["--context", "got -5"]),
        (["allocate", "s.json", "--max-bits", "17"], ["--max-bits", "1 to 16, got 17"]),
    ],
)
def test_usage_is_one_line(run, demo_model, arguments, parts):
    done = run(*[demo_model if a == "MODEL" else a for a in arguments])
    fails(done, *parts, status=2)
    assert len(done.stderr) < 300


def evaluate(run, folder, text):
    return run("evaluate", folder, "--text", text, "--windows", 1, "--length", 16, "--peer", "turboquant2")


def test_tiny_model_works_before_it_is_damaged(run, tiny, text):
    done = evaluate(run, tiny, text)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "fields, parts",
    [
        (dict(model_type="gpt_neox"), ["model_type", "gpt_neox", "llama", "qwen2", "qwen3", "gemma3_text", "mistral"]),
        (dict(model_type=7), ["model_type", "7"]),
        (dict(model_type=None), ["model_type"]),
        (dict(model_type="deepseek_v3", kv_lora_rank=512), ["kv_lora_rank", "multi-head latent attention"]),
        (dict(model_type="jamba", mamba_d_state=16), ["mamba_d_state", "Mamba"]),
        (dict(model_type="gemma2", query_pre_attn_scalar=64), ["sliding_window"]),
        (dict(num_hidden_layers=0), ["num_hidden_layers", "0"]),
        (dict(num_hidden_layers=4), ["model.layers.3"]),
        (dict(num_hidden_layers=2), ["model.layers.2"]),
        (dict(num_hidden_layers="three"), ["num_hidden_layers", "three"]),
        (dict(hidden_size=2**63), ["hidden_size", "9223372036854775808"]),
        (dict(hidden_size=-64), ["hidden_size", "-64"]),
        (dict(hidden_size=128), ["expected shape", "config.json"]),
        (dict(num_attention_heads=2**24, num_key_value_heads=2**24, head_dim=256), ["head_dim", "from 1 to 1", "256"]),
        (dict(num_key_value_heads=3), ["num_key_value_heads", "3"]),
        (dict(vocab_size=9000), ["embed_tokens", "9000"]),
        (
            dict(num_attention_heads=8, head_dim=16, num_hidden_layers=2, intermediate_size=100),
            ["q_proj.weight: expected shape [128, 64]", "gate_proj.weight: expected shape [100, 64]", "model.layers.2."],
        ),
        (dict(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
        (dict(hidden_act="relu"), ["hidden_act", "relu", "silu"]),
        (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), ["rope_type", "dynamic", "linear", "llama3"]),
        (dict(rope_scaling=dict(rope_type="linear", factor="two")), ["factor", "two"]),
        (dict(rope_scaling=dict(type="longrope", long_factor=[1.0])), ["long_factor", "8 numbers"]),
        (dict(rope_parameters=dict(rope_type="spiral", factor=2.0)), ["rope_type", "spiral", "longrope"]),
        (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), ["partial_rotary_factor", "0.5"]),
        (dict(rms_norm_eps=float("nan")), ["config.json"]),
        (dict(quantization=dict(bits=4, group_size=48)), ["quantization", "group_size", "48", "32, 64, 128"]),
        (dict(quantization=dict(bits=4, group_size=64, mode="zip")), ["quantization", "mode", "zip", "affine"]),
        (dict(quantization=dict(bits=7, group_size=64)), ["bits", "7", "2, 3, 4, 5, 6, 8"]),
        (dict(quantization_config=dict(quant_method="gptq")), ["quantization_config", "mlx_lm"]),
        (dict(layer_types=["sliding_attention"] * 3), ["sliding_window"]),
        (dict(layer_types=["full_attention"]), ["layer_types", "3 kinds"]),
        (dict(layer_types=["linear_attention"] + ["full_attention"] * 2), ["layer_types[0]", "linear_attention"]),
        (dict(bos_token_id=9999), ["bos_token_id", "9999"]),
    ],
)
def test_models_that_cannot_be_read(run, tiny, text, fields, parts):
    change_config(tiny, **fields)
    fails(evaluate(run, tiny, text), *parts)


def header_of(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_raw(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_damaged_weights(run, tiny, text):
    path = tiny / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        fails(evaluate(run, tiny, text), path)
    path.write_bytes(whole)
    header, data = header_of(path)
    name = "model.norm.weight"

    def broken(**fields):
        return {**header, name: {**header[name], **fields}}

    begin, end = header[name]["data_offsets"]
    for changed in (
        broken(shape=[2**62, 8]),
        broken(shape=[63]),
        broken(shape=[-64]),
        broken(shape="64"),
        broken(dtype="F99"),
        broken(data_offsets=[begin, 2**63]),
        broken(data_offsets=[2**63, 2**63 + 256]),
        broken(data_offsets=[end, begin]),
        broken(data_offsets=[begin - 4, end - 4]),
        broken(data_offsets=[begin]),
        {**header, name: 3},
    ):
        write_raw(path, changed, data)
        fails(evaluate(run, tiny, text), path)
    write_raw(path, header, data + b"1234")
    fails(evaluate(run, tiny, text), path)
    path.write_bytes(struct.pack("<Q", 2**63) + whole[8:])
    fails(evaluate(run, tiny, text), path)
    path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    fails(evaluate(run, tiny, text), path, "nested")


def test_missing_extra_and_nan_tensors(run, tiny, text):
    path = tiny / "model.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)  # before the file is overwritten
    name = "model.layers.1.self_attn.k_proj.weight"

    def save(**changes):
        changed = {**weights, **changes}
        mx.save_safetensors(str(path), {k: v for k, v in changed.items() if v is not None})

    save(**{name: None})
    fails(evaluate(run, tiny, text), name)
    save(**{"model.layers.1.self_attn.k_proj.bias": mx.zeros(32)})
    fails(evaluate(run, tiny, text), "k_proj.bias")
    spoilt = np.array(weights[name])
    spoilt[3, 5] = np.nan
    save(**{name: mx.array(spoilt)})
    fails(evaluate(run, tiny, text), name, "nan")
    save(**{name: mx.zeros(weights[name].shape, dtype=mx.int32)})
    fails(evaluate(run, tiny, text), name, "I32")


def test_weights_that_overflow(run, tiny, text, tmp_path):
    """Weights are finite, what comes out is not: a failure, never a result that is no number."""
    path = tiny / "model.safetensors"
    weights = dict(mx.load(str(path)))
    weights["model.layers.1.self_attn.k_proj.weight"] = mx.full(weights["model.layers.1.self_attn.k_proj.weight"].shape, 1e38)
    mx.save_safetensors(str(tmp_path / "changed.safetensors"), weights)
    (tmp_path / "changed.safetensors").rename(path)
    few = ["--text", text, "--samples", 1, "--length", 64]
    fails(evaluate(run, tiny, text), "full: window 0", "finite")
    fails(run("sensitivity", tiny, *few), "layer_1")
    fails(run("calibrate", tiny, "--method", "turboquant", "--bits", 3, *few, "-o", tmp_path / "x.plan"), "layer_1")


def test_noise_that_overflows(run, tiny, text):
    fails(run("sensitivity", tiny, "--text", text, "--samples", 1, "--length", 16, "--noise-scale", "1e300"), "noise_scale", "1e+300")


def test_missing_files(run, tiny, text, tmp_path):
    fails(evaluate(run, tmp_path / "nowhere", text), tmp_path / "nowhere")
    fails(run("evaluate", tiny, "--text", tmp_path / "no.txt", "--length", 16), tmp_path / "no.txt")
    fails(run("inspect", tmp_path / "no.plan"), tmp_path / "no.plan")
    (tiny / "tokenizer.json").unlink()
    fails(evaluate(run, tiny, text), "tokenizer.json")
    (tiny / "model.safetensors").unlink()
    fails(evaluate(run, tiny, text), tiny, "safetensors")
    (tiny / "config.json").unlink()
    fails(evaluate(run, tiny, text), "config.json")


def test_json_bombs(run, tiny, text, tmp_path):
    (tiny / "config.json").write_text("[" * 1_000_000)
    fails(evaluate(run, tiny, text), "config.json", "nested")
    bomb = tmp_path / "bomb.json"
    bomb.write_text('{"layer_0":' * 100_000)
    fails(run("allocate", bomb), bomb)
    bomb.write_text('{"layer_0": 1, "layer_0": 2}')
    fails(run("allocate", bomb), "twice")


def test_nul_bytes(run, tiny, text):
    with open(tiny / "config.json", "ab") as file:
        file.write(b"\0trailing")
    fails(evaluate(run, tiny, text), "config.json", "NUL")


def test_endless_pattern_of_a_tokenizer(run, tiny, text):
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "x" * 200_000 + "(?&y)"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
    (tiny / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = evaluate(run, tiny, text)
    fails(done, "tokenizer.json", "xxx")
    assert len(done.stderr) < 600


def test_vocabulary_that_does_not_fit(run, tmp_path, demo_model, text):
    folder = write_model(tmp_path / "small", "llama", vocab_size=300)
    shutil.copy(demo_model / "tokenizer.json", folder)
    fails(evaluate(run, folder, text), "8191", "300")


def test_text_too_short(run, tiny, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    fails(run("sensitivity", tiny, "--text", short, "--samples", 4, "--length", 128), "too short", "128")
    fails(run("evaluate", tiny, "--text", short, "--length", 64), "too short", "64")
    fails(run("sensitivity", tiny, "--length", 4096), "4096", "256")


def test_counts_that_are_too_large(run, tiny, text):
    most = 2147483647
    for command in (["sensitivity", tiny, "--samples", most, "--length", 64], ["evaluate", tiny, "--windows", most, "--length", 64]):
        fails(run(*command), "at most 4194304 sequences of 64 tokens", most)
    fails(run("evaluate", tiny, "--text", text, "--length", 64, "--windows", 1, "--recall", 20_000_000), "at most 100000 documents", "20000000")
    fails(run("calibrate", tiny, "--method", "vecinfer", "--samples", most, "--length", 64, "-o", tiny / "x.plan"), most)


def test_options_are_checked_before_own_text_is_written(run, tiny, demo_model, tmp_path):
    """So many samples of own text would take far longer than the limit."""

    def calibrate(*arguments, folder=demo_model):
        return run("calibrate", folder, "-o", tmp_path / "x.plan", "--samples", 2000, "--length", 256, *arguments, timeout=20)

    fails(calibrate("--bits", 99), "bits", "possible are 0.3", "at 2048 tokens", "99")
    fails(calibrate("--bits", 0.1), "bits", "possible are", "0.1")
    fails(calibrate("--bytes", "1TiB"), "bytes", "possible are", str(1 << 40))
    fails(calibrate("--context", 36), "context", "36 tokens of window and sinks", "got 36")
    fails(calibrate("--method", "vecinfer", "--bits", 99), "bits", "0.125 to 8", "99")
    fails(calibrate("--method", "vecinfer", "--bits", 1.5), "1.5", "sub-spaces")
    fails(calibrate("--method", "vecinfer", "--units", "head"), "uniform and layer", "head")
    for option in (["--window", 32], ["--sinks", 4], ["--keys", "plane"], ["--bytes", "1GiB"], ["--frontier"]):
        fails(calibrate("--method", "kivi", *option), option[0].lstrip("-"), "rotated_pq", "kivi")
    fails(calibrate("--method", "turboquant", "--units", "layer", "--bits", 6.25), "1.25 to 4.25", "6.25")
    fails(run("calibrate", tiny, "-o", ""), "expected the name of a file")
    fails(run("sensitivity", tiny, "-o", ""), "expected the name of a file")
    odd = write_model(tmp_path / "odd", "llama", vocab_size=8192, head_dim=24)
    shutil.copy(tiny / "tokenizer.json", odd)
    fails(calibrate("--method", "vecinfer", folder=odd), "vecinfer", "power of two", "24")


def test_bits_out_of_range_and_heads_that_do_not_suit(run, tiny, text, tmp_path):
    out = tmp_path / "out.plan"
    few = ["--text", text, "--samples", 8, "--length", 64, "-o", out]
    fails(run("calibrate", tiny, "--method", "turboquant", "--bits", 0.5, *few), "0.5")
    fails(run("calibrate", tiny, "--method", "turboquant", "--bits", 60, *few), "60")
    fails(run("calibrate", tiny, "--method", "vecinfer", "--bits", 1.5, *few), "1.5", "sub-spaces")
    odd = write_model(tmp_path / "odd", "llama", vocab_size=8192, head_dim=24)
    shutil.copy(tiny / "tokenizer.json", odd)
    fails(run("calibrate", odd, "--method", "vecinfer", *few), "24", "vecinfer")
    fails(run("evaluate", odd, "--text", text, "--windows", 1, "--length", 32, "--peer", "mlx4"), "24", "mlx4")
    assert run("calibrate", odd, "--method", "turboquant", "--bits", 3, *few).returncode == 0
    out.unlink()
    fails(run("calibrate", tiny, "--method", "vecinfer", "--bits", 4, "--text", text, "--samples", 1, "--length", 64, "-o", out), "256")
    assert list(tmp_path.glob("*out.plan*")) == []


def test_allocate_refuses_what_it_cannot_do(run, tmp_path):
    saved = tmp_path / "s.json"

    def with_layers(**layers):
        saved.write_text(json.dumps(layers))
        return run("allocate", saved)

    def layer(name, **fields):
        return {"layer_name": name, "mean_sensitivity": 1.0, "std_sensitivity": 0.1, **fields}

    good = layer("layer_0")
    assert with_layers(layer_0=good).returncode == 0
    fails(run("allocate", saved, "--bits", 5), "--bits", "5", "1 to 4")
    fails(run("allocate", saved, "--bits", 0.5), "--bits", "0.5")
    fails(run("allocate", saved, "--min-bits", 3, "--max-bits", 2), "--min-bits", "3", "2")
    fails(with_layers(layer_1=good), saved)
    fails(with_layers(layer_0=layer("layer_1")), "layer_name")
    fails(with_layers(layer_0=layer("layer_0", mean_sensitivity=-1)), "mean_sensitivity", "-1")
    fails(with_layers(layer_0=layer("layer_0", mean_sensitivity="high")), "mean_sensitivity", "high")
    fails(with_layers(layer_0={"layer_name": "layer_0"}), "mean_sensitivity")
    fails(with_layers(layer_0=layer("layer_0", distortions={"gptq": []})), "gptq", saved)
    rising = [{"rate": r, "keys": 0.01 * r, "values": 0.01 * r} for r in (1, 1.5, 2, 3, 4)]
    fails(with_layers(layer_0=layer("layer_0", distortions={"turboquant": rising})), saved, "layer_0", "does not fall")
    few = [{"rate": r, "keys": 0.1 / r, "values": 0.1 / r} for r in (2, 3)]
    fails(with_layers(layer_0=layer("layer_0", distortions={"turboquant": few})), saved, "layer_0", "2 to 3 bits")
    saved.write_text("[]")
    fails(run("allocate", saved), saved)


def test_unwritable_output(run, tiny, text, tmp_path):
    folder = tmp_path / "missing"
    fails(run("calibrate", tiny, "--text", text, "-o", folder / "x.plan"), folder)
    fails(run("calibrate", tiny, "--text", text, "-o", tmp_path), tmp_path)
    fails(run("sensitivity", tiny, "--text", text, "-o", folder / "x.json"), folder)


def test_special_files_are_no_output(run, tiny, text, tmp_path):
    pipe, target, link = tmp_path / "pipe", tmp_path / "target.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    fails(run("sensitivity", tiny, "--text", text, "-o", pipe), pipe, "regular file")
    assert pipe.is_fifo()
    target.write_text("old")
    link.symlink_to(target.name)
    done = run("sensitivity", tiny, "--text", text, "--samples", 1, "--length", 16, "-o", link)
    assert done.returncode == 0, done.stderr
    assert link.is_symlink() and "layer_0" in target.read_text()


def test_damaged_and_foreign_plans(run, tiny, demo_model, plan, tmp_path, text):
    data = plan.read_bytes()
    copy = tmp_path / "copy.plan"
    for at in (9, 200, 3000, len(data) // 2, len(data) - 1):
        copy.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        fails(run("verify", copy), copy)
    for size in (0, 5, 1000, len(data) - 1):
        copy.write_bytes(data[:size])
        fails(run("inspect", copy), copy)
    fails(run("verify", demo_model / "model.safetensors"), "format")
    fails(run("verify", plan, "--model", tiny), "another model", "architecture", plan, tiny)
    assert "same architecture and shapes" in run("verify", plan, "--model", demo_model).stdout
    fails(run("evaluate", tiny, "--plan", plan, "--text", text, "--length", 16), "another model", plan)


def test_interrupt_stops_soon_and_leaves_no_file(program, demo_model, tmp_path):
    process = subprocess.Popen([program, "calibrate", demo_model, "-o", tmp_path / "x.plan"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in stderr
    assert list(tmp_path.iterdir()) == []


def test_gpu_is_refused_where_there_is_none(run, tiny, text):
    done = run("evaluate", tiny, "--text", text, "--length", 16, "--device", "gpu")
    if done.returncode != 0:
        fails(done, "gpu")
