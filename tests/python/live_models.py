"""Small random models of mlx_lm's own classes, alive in memory."""
import importlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

BASE = dict(
    hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=8192,
    rms_norm_eps=1e-5, layer_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=256,
)
GPT2 = dict(n_embd=64, n_head=4, n_layer=2, n_positions=256, layer_norm_epsilon=1e-5)

# Families that the C++ engine does not have, and that keep keys and values of every token.
FAMILIES = {
    "cohere": dict(logit_scale=0.25),
    "cohere2": dict(logit_scale=0.25, sliding_window=8, sliding_window_pattern=2),
    "exaone4": dict(tie_word_embeddings=True, rope_scaling=None, sliding_window=8, sliding_window_pattern="LG"),
    "gemma": {},
    "glm4": dict(attention_bias=False, partial_rotary_factor=0.5),
    "gpt2": dict(n_ctx=256, **GPT2),
    "gpt_bigcode": dict(n_inner=96, multi_query=True, attention_bias=True, mlp_bias=True, **GPT2),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.25),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8, rope_scaling=None),
    "internlm2": dict(bias=False),
    "nemotron": dict(hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5),
    "olmo2": dict(attention_bias=False, mlp_bias=False),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "phi": dict(partial_rotary_factor=0.5),
    "stablelm": dict(rope_pct=0.25, partial_rotary_factor=0.25, use_qkv_bias=True, qk_layernorm=False),
    "starcoder2": dict(norm_epsilon=1e-5),
}

# What nothing here can run, and the layer that says so.
UNFIT = {
    "mamba": (dict(state_size=16, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=8), "ResidualBlock"),
    "falcon_h1": ({}, "FalconH1DecoderLayer"),
    "jamba": (
        dict(
            attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2, mamba_d_conv=4, mamba_d_state=16, mamba_expand=2,
            num_experts=1, num_experts_per_tok=1,
        ),
        "JambaDecoderLayer",
    ),
    "recurrent_gemma": (
        dict(attention_bias=False, conv1d_width=4, logits_soft_cap=30.0, attention_window_size=16, block_types=["recurrent", "attention"], lru_width=64),
        "ResidualBlock",
    ),
    "deepseek_v3": (dict(kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16), "DeepseekV3DecoderLayer"),
}


def live_model(name, dtype=mx.float32, seed=0, **arguments):
    """A random model in evaluation mode; weights are drawn so that attention is peaked and logits spread, as in trained models."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict({**BASE, "model_type": name, **arguments}))
    rng = np.random.default_rng(seed)

    def draw(key, x):
        if x.ndim == 1:
            return 1 + 0.2 * rng.standard_normal(x.shape) if "norm" in key or "ln_" in key else 0.1 * rng.standard_normal(x.shape)
        return rng.standard_normal(x.shape) * (0.5 if "emb" in key or "wte" in key else 1.2 / np.sqrt(x.shape[-1]))

    model.load_weights([(k, mx.array(draw(k, v), dtype=mx.float32).astype(dtype)) for k, v in tree_flatten(model.parameters())])
    mx.eval(model.parameters())
    return model.eval()


def parameters_of(model):
    """A copy of every parameter, with its type, to compare with later."""
    return {name: (x.dtype, np.array(x.astype(mx.float32))) for name, x in tree_flatten(model.parameters())}


def assert_same_parameters(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name][0] == theirs[name][0], name
        np.testing.assert_array_equal(ours[name][1], theirs[name][1], err_msg=name)
