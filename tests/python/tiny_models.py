"""Small random models in Hugging Face layout, of every family that the engine has."""
import importlib
import json

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx.utils import tree_flatten, tree_map

BASE = dict(
    hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
    vocab_size=300, max_position_embeddings=256, rope_theta=10000.0, hidden_act="silu", bos_token_id=1, eos_token_id=2,
)

YARN_ROPE = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=1.0)
LONG_ROPE = dict(type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 1.5, 2.5, 4.0])
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1)
GEMMA = dict(head_dim=32, sliding_window=24, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=24)

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
    "llama_yarn": dict(model_type="llama", rope_scaling=YARN_ROPE, tie_word_embeddings=True),
    "llama_sliding": dict(
        model_type="llama", sliding_window=24, layer_types=["sliding_attention", "full_attention", "sliding_attention"], tie_word_embeddings=True
    ),
    "mistral": dict(model_type="mistral", head_dim=32, sliding_window=None, tie_word_embeddings=False),
    "mistral_sliding": dict(model_type="mistral", sliding_window=24, tie_word_embeddings=False),
    "gemma2": dict(model_type="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **GEMMA),
    "gemma3_text": dict(
        model_type="gemma3_text", sliding_window_pattern=2, rope_theta=1e6, rope_local_base_freq=1e3,
        rope_scaling=dict(rope_type="linear", factor=8.0), **GEMMA
    ),
    "phi3": dict(model_type="phi3", tie_word_embeddings=False),
    "phi3_longrope": dict(
        model_type="phi3", partial_rotary_factor=0.5, rope_scaling=LONG_ROPE, original_max_position_embeddings=64, tie_word_embeddings=False
    ),
    "phi3_share_in_rope_parameters": dict(
        model_type="phi3", partial_rotary_factor=0.5, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        tie_word_embeddings=False
    ),
    "smollm3": dict(model_type="smollm3", no_rope_layer_interval=2, tie_word_embeddings=True),
    "smollm3_listed": dict(model_type="smollm3", no_rope_layers=[0, 1, 1], tie_word_embeddings=True),
    "qwen3_moe": dict(model_type="qwen3_moe", head_dim=32, mlp_only_layers=[1], norm_topk_prob=True, tie_word_embeddings=False, **EXPERTS),
    "qwen3_moe_plain": dict(model_type="qwen3_moe", head_dim=16, mlp_only_layers=[], norm_topk_prob=False, tie_word_embeddings=True, **EXPERTS),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "granite": dict(
        model_type="granite", attention_bias=False, mlp_bias=False, logits_scaling=4.0, attention_multiplier=0.2, embedding_multiplier=3.0,
        residual_multiplier=0.4, tie_word_embeddings=True
    ),
}

# mlx_lm leaves these windows out; transformers does not.
WINDOWS_OF_CONFIG = {"mistral_sliding": lambda layer: True, "gemma2": lambda layer: layer % 2 == 0}


def module_of(config):
    """mlx_lm's module for a config."""
    model_type = config["model_type"]
    return importlib.import_module(f"mlx_lm.models.{'llama' if model_type == 'mistral' else model_type}")


def windowed(model, slides, window):
    """The same model, whose layers that slide see a window: masks are given to its own layers one by one."""

    def sliding(layer, size):
        return lambda x, mask=None, cache=None: layer(x, create_causal_mask(x.shape[1], window_size=size), cache)

    layers = [sliding(layer, window if slides(i) else None) for i, layer in enumerate(model.model.layers)]

    def logits(tokens):
        kept, model.model.layers = model.model.layers, layers
        for layer in layers:
            layer.use_sliding = False
        try:
            return model(tokens)
        finally:
            model.model.layers = kept

    return logits


def load_mlx_lm(folder):
    """The model that mlx_lm builds from a folder, in float32."""
    config = json.loads((folder / "config.json").read_text())
    module = module_of(config)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(mx.load(str(file)))
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    model.load_weights(list(weights.items()))
    model.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())
    return model


def write_model(folder, name, dtype=mx.float32, shards=1, seed=0, **overrides):
    """Writes a random model; weights are drawn so that attention is peaked and logits spread, as in trained models."""
    config = {**BASE, **CONFIGS.get(name, {}), **overrides}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    module = module_of(config)
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
