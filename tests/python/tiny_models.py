"""Small random models in Hugging Face layout, of every family that the engine has."""
import importlib
import json

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

BASE = dict(
    hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
    vocab_size=300, max_position_embeddings=256, rope_theta=10000.0, hidden_act="silu", bos_token_id=1, eos_token_id=2,
)

LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)

CONFIGS = {
    "llama": dict(model_type="llama", tie_word_embeddings=False),
    "llama_tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama_bias": dict(model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama_head_dim": dict(model_type="llama", head_dim=32, num_key_value_heads=4, tie_word_embeddings=False),
    "llama_one_kv_head": dict(model_type="llama", num_key_value_heads=1, tie_word_embeddings=True),
    "llama_linear": dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=4.0), tie_word_embeddings=True),
    "llama_linear_old": dict(model_type="llama", rope_scaling=dict(type="linear", factor=2.0), tie_word_embeddings=True),
    "llama_llama3": dict(model_type="llama", rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2_untied": dict(model_type="qwen2", tie_word_embeddings=False),
    "qwen3": dict(model_type="qwen3", head_dim=32, tie_word_embeddings=True),
    "qwen3_untied": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=False),
}


def load_mlx_lm(folder):
    """The model that mlx_lm builds from a folder, in float32."""
    config = json.loads((folder / "config.json").read_text())
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(mx.load(str(file)))
    model.load_weights(list(model.sanitize(weights).items()))
    model.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())
    return model


def write_model(folder, name, dtype=mx.float32, shards=1, seed=0, **overrides):
    """Writes a random model; weights are drawn so that attention is peaked and logits spread, as in trained models."""
    config = {**BASE, **CONFIGS.get(name, {}), **overrides}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)

    def draw(key, x):
        if x.ndim == 1:
            return 1 + 0.2 * rng.standard_normal(x.shape) if "norm" in key else 0.3 * rng.standard_normal(x.shape)
        return rng.standard_normal(x.shape) * (1.0 if "embed" in key else 1.5 / np.sqrt(x.shape[-1]))

    weights = {k: mx.array(draw(k, v), dtype=mx.float32).astype(dtype) for k, v in tree_flatten(model.parameters())}
    names = sorted(weights)
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    else:
        index = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: weights[n] for n in names[i::shards]}
            mx.save_safetensors(str(folder / file), part)
            index.update({n: file for n in part})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
