"""What evaluate says against mlx_lm, transformers and NumPy on the same tokens."""
import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from transformers import AutoTokenizer

from command_line import fails

BEGIN = {"type": "TemplateProcessing", "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
         "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]}


@pytest.fixture(scope="session")
def begins(demo_model, tmp_path_factory):
    """The bundled model, with a tokenizer that puts a begin of text before a text."""
    folder = tmp_path_factory.mktemp("begins") / "model"
    shutil.copytree(demo_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = BEGIN
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def rows_of(run, *arguments):
    done = run("evaluate", *arguments, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def exact_model(folder):
    """In float32, as what is measured."""
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    return model


def log_probabilities(model, tokens, caches, step):
    """[T, vocab_size], of tokens that are read `step` at a time."""
    parts = []
    with mx.stream(mx.cpu):
        for begin in range(0, len(tokens), step):
            logits = model(mx.array([tokens[begin : begin + step]]), cache=caches)[0].astype(mx.float32)
            parts.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64))
    return np.concatenate(parts)


def perplexity(log_p, tokens, first=0):
    return np.exp(-np.mean([log_p[t, tokens[t + 1]] for t in range(first, len(tokens) - 1)]))


# Scoring ---------------------------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_mlx_lm(run, demo_model, text):
    """mlx_lm's own quantized cache, written to token by token, against the peer of the same name."""
    model = exact_model(demo_model)
    length, first = 160, 96
    tokens = AutoTokenizer.from_pretrained(demo_model).encode(text.read_text())[: 2 * length]
    kl, agree, full_perplexity, stored_perplexity = [], [], [], []
    for window in (tokens[:length], tokens[length:]):
        full = log_probabilities(model, window, [KVCache() for _ in model.layers], length)
        stored = log_probabilities(model, window, [QuantizedKVCache(group_size=64, bits=4) for _ in model.layers], 1)
        kl.append((np.exp(full) * (full - stored)).sum(-1)[first:])
        agree.append((full.argmax(-1) == stored.argmax(-1))[first:])
        full_perplexity.append(np.log(perplexity(full, window, first)))
        stored_perplexity.append(np.log(perplexity(stored, window, first)))
    arguments = [demo_model, "--text", text, "--windows", 2, "--length", length, "--score-from", first, "--peer", "mlx4", "--stepwise"]
    full_row, row = rows_of(run, *arguments)
    assert (row["step"], row["score_from"]) == (1, first)
    # Codes are discontinuous: other kernels of OpenBLAS, or mlx_lm's own BLAS, move the mean by 1 % and the maximum by 7 % (of 2 bits, perplexity
    # by 5 %). Standard errors are tested where the scores are known (statistics_test.cpp).
    assert row["kl_mean"] == pytest.approx(np.mean(kl), rel=0.05)
    assert row["kl_median"] == pytest.approx(np.median(kl), rel=0.1)
    assert row["kl_max"] == pytest.approx(np.max(kl), rel=0.2)
    assert row["top1"] == pytest.approx(np.mean(agree), abs=0.03)
    assert full_row["perplexity"] == pytest.approx(np.exp(np.mean(full_perplexity)), rel=1e-4)
    assert row["perplexity"] == pytest.approx(np.exp(np.mean(stored_perplexity)), rel=0.01)
    assert row["perplexity_change"] == pytest.approx(row["perplexity"] - full_row["perplexity"])
    # half a window where nothing is said
    arguments[7:9] = []
    assert rows_of(run, *arguments)[1]["score_from"] == length // 2
    assert rows_of(run, *arguments, "--step", 40)[1]["step"] == 40


def test_scoring_that_cannot_be(run, demo_model, text):
    few = [demo_model, "--text", text, "--windows", 1, "--length", 64]
    for first in (63, 64, 1000):
        fails(run("evaluate", *few, "--score-from", first), "score_from", "0 to 62", "64 tokens", first)
    fails(run("evaluate", *few, "--score-from", "-1"), "--score-from", "whole number from 0", "-1", status=2)
    fails(run("evaluate", *few, "--stepwise", "--step", "0"), "--step", "whole number from 1", "got 0", status=2)
    fails(run("evaluate", *few, "--step", "4"), "--step", "--stepwise", status=2)
    assert run("evaluate", *few, "--score-from", 62, "--stepwise").returncode == 0


def test_windows_beyond_the_maximum_are_warned_of(run, tiny, text):
    done = run("evaluate", tiny, "--text", text, "--windows", 1, "--length", 300, "--stepwise", "--step", 50, "--score-from", 280, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)[0]["length"] == 300
    assert "windows of 300 tokens, and the model was made for 256" in done.stderr


def test_table_is_narrow_enough_to_read(run, demo_model, text):
    done = run("evaluate", demo_model, "--text", text, "--windows", 2, "--length", 320, "--peer", "mlx4", "--peer", "turboquant2+window", "--recall", 1)
    assert done.returncode == 0 and "±" in done.stdout and "mean less mlx4's" in done.stdout, done.stderr
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("2 windows")) <= 110
    one = run("evaluate", demo_model, "--text", text, "--windows", 1, "--length", 64, "--peer", "mlx4")
    assert "±" not in one.stdout and "mean less" not in one.stdout and "recall" not in one.stdout


# Begin of text ---------------------------------------------------------------------------------------------------------------------


def test_windows_begin_with_the_begin_of_text(run, begins, demo_model, text):
    model = exact_model(demo_model)
    tokenizer = AutoTokenizer.from_pretrained(begins)
    tokens = tokenizer.encode(text.read_text())
    assert tokens[0] == 0 and 0 not in tokens[1:]
    width = 95
    windows = [tokens[:1] + tokens[1 + i * width : 1 + (i + 1) * width] for i in range(2)]
    expected = np.exp(np.mean([np.log(perplexity(log_probabilities(model, w, [KVCache() for _ in model.layers], 96), w)) for w in windows]))
    few = ["--text", text, "--windows", 2, "--length", 96]
    (row,) = rows_of(run, begins, *few)
    assert row["perplexity"] == pytest.approx(expected, rel=1e-4)
    (without,) = rows_of(run, demo_model, *few)
    assert abs(without["perplexity"] / expected - 1) > 1e-3
    assert "behind the begin of text" in run("evaluate", begins, *few).stdout
    assert "behind the begin of text" not in run("evaluate", demo_model, *few).stdout


@pytest.mark.parametrize("said", [True, False, None])
def test_tokenizer_json_decides_as_in_transformers(said, run, begins, demo_model, text, tmp_path):
    """add_bos_token of tokenizer_config.json says nothing where there is a tokenizer.json."""
    few = ["--text", text, "--windows", 1, "--length", 32]
    for source in (begins, demo_model):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | ({} if said is None else {"add_bos_token": said})))
        adds = AutoTokenizer.from_pretrained(folder).encode("a")[0] == 0
        assert adds == (source is begins)
        assert rows_of(run, folder, *few) == rows_of(run, source, *few)


def test_template_of_another_model(run, begins, text, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(begins, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"]["special_tokens"]["<|endoftext|>"]["ids"] = [9000]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    fails(run("evaluate", folder, "--text", text, "--windows", 1, "--length", 32), "9000", "8192")


def test_samples_of_calibration_begin_with_it(run, begins, demo_model, text, words):
    """Program and module, with tokenizers of every kind."""
    ratequant = pytest.importorskip("veloxquant_mlx.allocators.ratequant", reason="the Python module is not built", exc_type=ModuleNotFoundError)
    done = run("sensitivity", begins, "--text", text, "--samples", 2, "--length", 64, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    expected = {name: layer["mean_sensitivity"] for name, layer in json.loads(done.stdout).items()}
    model, wrapper = mlx_lm.load(str(begins))
    hugging_face = AutoTokenizer.from_pretrained(begins)

    class Odd:
        def encode(self, string, add_special_tokens=True):
            return hugging_face.encode(string, add_special_tokens=add_special_tokens)

    def means(source, tokenizer=None):
        found = ratequant.calibrate_layer_sensitivities(source, tokenizer, num_samples=2, sequence_length=64, text=text, device="cpu")
        return {name: layer.mean_sensitivity for name, layer in found.items()}

    for source in ((begins,), (begins, Odd()), (model, wrapper), (model, hugging_face), (model, Odd())):
        assert means(*source) == pytest.approx(expected, rel=0.01), source
    assert means(demo_model) != pytest.approx(expected, rel=0.01)
    # and where a model runs by its own code
    own_forward = pytest.importorskip("veloxquant_mlx._own_forward").OwnForward(model, Odd(), "cpu")
    samples = own_forward.samples([("text", text.read_text())], 2, 64, 0, lambda *_: None)
    assert samples[0].tolist() == hugging_face.encode(text.read_text())[:64] and samples[1][0] == 0


# Saved logits ----------------------------------------------------------------------------------------------------------------------


def test_full_precision_is_computed_once(run, demo_model, text, tmp_path):
    """Saved in one go, compared with in steps."""
    path = tmp_path / "logits.safetensors"
    few = [demo_model, "--text", text, "--windows", 3, "--length", 128, "--score-from", 64]
    assert run("evaluate", *few, "--save-logits", path).returncode == 0
    measure = [*few, "--peer", "mlx2", "--peer", "turboquant3", "--stepwise", "--step", 8]
    exact, saved = rows_of(run, *measure), rows_of(run, *measure, "--logits", path)
    for a, b in zip(exact, saved):
        assert a["kl_sampling_error"] is None and b["kl_sampling_error"] < 0.01 * a["kl_mean"] + 1e-9
        assert b["kl_mean"] == pytest.approx(a["kl_mean"], abs=4 * b["kl_sampling_error"] + 1e-6)
        assert b["top1"] == a["top1"]
        assert b["perplexity"] == pytest.approx(a["perplexity"], rel=1e-4)
        assert b["perplexity_change_error"] == pytest.approx(a["perplexity_change_error"], rel=0.02, abs=1e-3)


def test_logits_of_something_else(run, demo_model, begins, tiny, text, plan, tmp_path):
    path, other = tmp_path / "logits.safetensors", tmp_path / "other"
    few = ["--text", text, "--windows", 2, "--length", 64]
    assert run("evaluate", demo_model, *few, "--score-from", 8, "--save-logits", path).returncode == 0

    def refused(*parts, model=demo_model, few=few, more=("--score-from", 8)):
        fails(run("evaluate", model, *few, *more, "--logits", path), path, *parts)

    refused("model: expected llama of 3 layers", "got qwen2 of 12 layers", model=tiny)
    refused("SHA-256 of the windows' tokens", model=begins)
    refused("windows: expected 3, got 2", few=[*few[:3], 3, *few[4:]])
    refused("length: expected 65, got 64", few=[*few[:5], 65])
    refused("score_from: expected at most 7, got 8", more=("--score-from", 7))
    refused("SHA-256", few=["--windows", 2, "--length", 64], more=("--score-from", 8))  # own text
    # the same shape, other weights
    shutil.copytree(demo_model, other)
    weights = dict(mx.load(str(other / "model.safetensors")))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.05
    mx.save_safetensors(str(other / "model.safetensors"), weights)
    refused("model: expected logits of its weights", model=other)
    # not such a file
    shutil.copy(plan, path)
    refused("format: expected veloxquant-logits")
    path.write_bytes(b"")
    refused()
    path.unlink()
    refused()
    fails(run("evaluate", demo_model, *few, "--save-logits", tmp_path / "no" / "where"), tmp_path / "no")
    fails(run("evaluate", demo_model, *few, "--save-logits", path, "--logits", path), "--logits", "--save-logits", status=2)
    assert not path.exists()
