"""Logits against mlx_lm, which reads the same folders."""
import json
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model
from safetensors.numpy import load_file, save_file

from tiny_models import CONFIGS, WINDOWS_OF_CONFIG, load_mlx_lm, windowed, write_model

# Float32 sums in another order: relative to the range of the logits.
TOLERANCE = 1e-4


def our_logits(tools, folder, tokens, tmp_path, chunk=0):
    source, result = tmp_path / "tokens.safetensors", tmp_path / "logits.safetensors"
    save_file({"tokens": tokens.astype(np.float32)}, source)
    done = subprocess.run([tools / "logits_tool", folder, source, result, str(chunk)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return load_file(result)["logits"]


def their_logits(folder, tokens, slides=None):
    model = load_mlx_lm(folder)
    if slides:
        model = windowed(model, slides, json.loads((folder / "config.json").read_text())["sliding_window"])
    return np.array(model(mx.array(tokens)))


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.ptp(theirs)


def random_tokens(batch, length, vocabulary=300, seed=1):
    return np.random.default_rng(seed).integers(0, vocabulary, (batch, length))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 4])
def test_every_family(name, batch, tools, tmp_path):
    folder = write_model(tmp_path / name, name)
    # 100 tokens: past the 64 that the llama3 scaling takes for the original length
    tokens = random_tokens(batch, 100)
    theirs = their_logits(folder, tokens, WINDOWS_OF_CONFIG.get(name))
    assert_same(our_logits(tools, folder, tokens, tmp_path), theirs)
    assert_same(our_logits(tools, folder, tokens, tmp_path, chunk=33), theirs)


def test_one_token_at_a_time(tools, tmp_path):
    folder = write_model(tmp_path / "m", "llama_llama3")
    tokens = random_tokens(2, 40)
    assert_same(our_logits(tools, folder, tokens, tmp_path, chunk=1), their_logits(folder, tokens))


@pytest.mark.parametrize("name", ["llama_llama3", "llama_linear", "qwen2"])
def test_far_past_the_original_length(name, tools, tmp_path):
    folder = write_model(tmp_path / name, name)
    tokens = random_tokens(1, 700)
    theirs = their_logits(folder, tokens)
    assert_same(our_logits(tools, folder, tokens, tmp_path), theirs)
    assert_same(our_logits(tools, folder, tokens, tmp_path, chunk=256), theirs)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_storage_types_and_shards(dtype, shards, tools, tmp_path):
    folder = write_model(tmp_path / "m", "qwen3", dtype=dtype, shards=shards)
    tokens = random_tokens(1, 50)
    assert_same(our_logits(tools, folder, tokens, tmp_path), their_logits(folder, tokens))


def expert_by_expert(folder, names):
    """As Hugging Face writes experts: a tensor for each."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in [n for n in weights if ".switch_mlp." in n]:
        stack = weights.pop(name)
        block, part = name.split("switch_mlp.")
        for i, one in enumerate(stack):
            weights[f"{block}experts.{i}.{names[part.split('.')[0]]}.weight"] = np.ascontiguousarray(one)
    save_file(weights, path)


@pytest.mark.parametrize("name, names", [
    ("qwen3_moe", {n: n for n in ("gate_proj", "up_proj", "down_proj")}),
    ("mixtral", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
])
def test_experts_as_hugging_face_writes_them(name, names, tools, tmp_path):
    folder = write_model(tmp_path / name, name)
    tokens = random_tokens(1, 40)
    theirs = their_logits(folder, tokens)
    expert_by_expert(folder, names)
    assert_same(our_logits(tools, folder, tokens, tmp_path), theirs)


def pack(folder, **options):
    """The same model as mlx_lm packs it: config, logits."""
    config = json.loads((folder / "config.json").read_text())
    model, config = quantize_model(load_mlx_lm(folder), config, **options)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return lambda tokens: np.array(model(mx.array(tokens)))


@pytest.mark.parametrize("name, bits, mode", [
    ("llama", 4, "affine"), ("qwen3", 3, "affine"), ("qwen2", 8, "affine"), ("llama", 4, "mxfp4"), ("phi3", 6, "affine"), ("mixtral", 4, "affine"),
])
def test_packed_weights(name, bits, mode, tools, tmp_path):
    # Widths that groups of 32 divide; mixtral's router stays as it is.
    folder = write_model(tmp_path / "m", name, hidden_size=64, intermediate_size=96)
    theirs = pack(folder, group_size=32, bits=bits, mode=mode)
    tokens = random_tokens(2, 40)
    assert_same(our_logits(tools, folder, tokens, tmp_path), theirs(tokens))


def test_packed_weights_of_several_widths(tools, tmp_path):
    folder = write_model(tmp_path / "m", "llama", intermediate_size=128)

    def width(path, module):
        if "down_proj" in path:
            return {"group_size": 32, "bits": 8}
        return "v_proj" not in path and hasattr(module, "to_quantized")

    theirs = pack(folder, group_size=64, bits=4, quant_predicate=width)
    # An adapter beside the model is not read.
    save_file({"lora": np.zeros((2, 2), np.float32)}, folder / "adapters.safetensors")
    assert "model.layers.0.mlp.down_proj" in json.loads((folder / "config.json").read_text())["quantization"]
    tokens = random_tokens(1, 40)
    assert_same(our_logits(tools, folder, tokens, tmp_path), theirs(tokens))


def test_rope_parameters_of_newer_configs(tools, tmp_path):
    """transformers 5 writes rope_parameters; rope_theta and rope_scaling mean the same."""
    folder = write_model(tmp_path / "m", "llama_llama3")
    tokens = random_tokens(1, 90)
    theirs = their_logits(folder, tokens)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(our_logits(tools, folder, tokens, tmp_path), theirs)


def test_bundled_model(tools, demo_model, tmp_path):
    tokens = random_tokens(1, 512, vocabulary=8192)
    assert_same(our_logits(tools, demo_model, tokens, tmp_path, chunk=200), their_logits(demo_model, tokens))


@pytest.mark.parametrize("name", ["demo", "mid"])
def test_trained_models(name, tools, shared, tmp_path):
    tokens = random_tokens(1, 300, vocabulary=8192)
    assert_same(our_logits(tools, shared / "models" / name, tokens, tmp_path), their_logits(shared / "models" / name, tokens))
