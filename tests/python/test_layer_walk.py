"""Models whose layers are called one by one: how keys turn is read from what layers make of them, and gradients are those of the engine."""
import numpy as np
import pytest

pytest.importorskip("veloxquant_mlx", reason="the Python module is not built", exc_type=ModuleNotFoundError)

import mlx.core as mx
from mlx_lm.models.rope_utils import initialize_rope
from veloxquant_mlx._layer_walk import LayerWalk
from veloxquant_mlx._live import engine_model
from veloxquant_mlx._load import core
from veloxquant_mlx._own_forward import OwnForward

from live_models import live_model

ROPES = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


class Silent:
    """A tokenizer that nobody asks."""

    bos_token_id = 0

    def encode(self, text, **_):
        return [0]


def turned(x, radians, order, offset):
    """x [.., T, D] by NumPy as RoPE turns it, pair i of n being (i, i + n) in this order."""
    x = x.astype(np.float64)
    if order is not None:
        x = x[..., order]
    n = len(radians)
    angles = (np.arange(x.shape[-2]) + offset)[:, None] * np.asarray(radians)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest], axis=-1)


@pytest.mark.parametrize("name", ROPES)
def test_turning_is_that_of_mlx(name):
    model = live_model("llama", rope_scaling=ROPES[name])
    radians, order = LayerWalk(model)._read_turning(1, 64)
    assert order is None and len(radians) == 8
    rope = initialize_rope(16, 10000.0, False, ROPES[name], 256)
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 16)).astype(np.float32)
    scale = np.linalg.norm(np.array(rope(mx.array(x)))) / np.linalg.norm(x)  # yarn also lengthens
    for offset in (0, 7, 200):
        theirs = np.array(rope(mx.array(x), offset=offset)) / scale
        np.testing.assert_allclose(turned(x, radians, order, offset), theirs, atol=2e-4)


@pytest.mark.parametrize("family, dims, neighbours", [("stablelm", 4, False), ("cohere", 16, True), ("gpt2", 0, False), ("olmo2", 16, False)])
def test_parts_and_neighbours_turn(family, dims, neighbours):
    from live_models import FAMILIES

    radians, order = LayerWalk(live_model(family, **FAMILIES[family]))._read_turning(0, 64)
    assert 2 * len(radians) == dims and (order is not None) == neighbours
    if dims:
        expected = 10000.0 ** (-2 * np.arange(dims // 2) / dims)
        np.testing.assert_allclose(radians, expected, rtol=2e-5)
    if neighbours:
        assert list(np.array(order)) == [*range(0, 16, 2), *range(1, 16, 2)]


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("window", [0, 8])
def test_gradients_are_those_of_the_engine(name, window):
    # Few tokens, so that rounding hardly ever draws another one.
    model = live_model("llama", rope_scaling=ROPES[name], num_hidden_layers=3, vocab_size=32)
    engine = engine_model(model, Silent(), "cpu")
    assert engine is not None
    samples = np.random.default_rng(1).integers(0, 32, (2, 40)).astype(np.int32)
    with OwnForward(model, Silent(), "cpu"), LayerWalk(model) as walk:
        live = walk.engine_model(0, turns=True)
        tokens = mx.array(samples)
        np.testing.assert_allclose(np.array(live.logits(tokens, "cpu")), np.array(engine.logits(tokens, "cpu")), atol=3e-4)
        ours = core.likelihood_gradients(live, samples, window, 0, "cpu")
        theirs = core.likelihood_gradients(engine, samples, window, 0, "cpu")
    assert len(ours) == 3
    for mine, engines in zip(ours, theirs, strict=True):
        assert mine[:2] == engines[:2]
        keys, their_keys = np.array(mine[2]), np.array(engines[2])
        # Keys at position 0 count as not turned: a rope that lengthens is in them.
        length = np.linalg.norm(keys) / np.linalg.norm(their_keys)
        np.testing.assert_allclose(keys, length * their_keys, atol=2e-3 * np.abs(keys).max())
        for a, b, scale in zip(mine[3:], engines[3:], (1, 1 / length, 1), strict=True):
            a, b = np.array(a), np.array(b) * scale
            assert np.linalg.norm(a - b) < 2e-3 * np.linalg.norm(b)


def test_attention_is_put_back():
    from mlx_lm.models import base, llama

    before = base.scaled_dot_product_attention, llama.scaled_dot_product_attention
    model = live_model("llama")
    layers = list(model.layers)
    with pytest.raises(RuntimeError), LayerWalk(model):
        assert llama.scaled_dot_product_attention is not before[1]
        raise RuntimeError
    assert (base.scaled_dot_product_attention, llama.scaled_dot_product_attention) == before
    assert all(a is b for a, b in zip(model.layers, layers, strict=True))
