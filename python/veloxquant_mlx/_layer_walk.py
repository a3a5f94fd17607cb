"""Live mlx_lm models of any family as a stack of layers whose attention is ours, for calibrate().

Layers are called one by one, and scaled_dot_product_attention of mlx_lm's modules finds our caches.  How a layer turns its keys by
position (RoPE) is read from what it makes of one token at several positions, whatever module of it does so.
"""

import contextlib

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ._attention import OurAttention, know_our_caches
from ._live import own_caches
from ._load import core
from ._own_forward import layer_name

# What still works where this does not.
_ALLOCATORS = "veloxquant_mlx.allocators run such a model, calibrate does not"
_OTHER_METHOD = 'method="vecinfer" (or "turboquant", "kivi", "affine") stores keys as the layer gives them'

# Where a layer is asked for its keys: far enough that every pair of dimensions that turns has turned.
_FAR = 1 << 20

# Angles beyond this are rounded too much to say more of a frequency.
_MOST_RADIANS = 64.0


class _Reached(Exception):
    """Ends a run of the model where all that was wanted is there."""


class _Cache(KVCache):
    """Stands where a layer keeps its keys and values."""

    def make_mask(self, *args, **kwargs):
        return None


class _KeysAt(_Cache):
    """Sees what keys a layer makes of a token at a position."""

    def __init__(self, position):
        super().__init__()
        self.offset = position

    def update_and_fetch(self, keys, values):
        self.seen = keys, values
        raise _Reached


class _Attention(_Cache, OurAttention):
    """Gives a layer's queries, keys and values to the engine's attention."""

    def __init__(self, attention, order):
        super().__init__()
        self.attention, self.order, self.offset, self.result = attention, order, attention.offset, None

    def update_and_fetch(self, keys, values):
        self.keys, self.values = keys, values
        return keys, values

    def attend(self, queries, keys, values, scale):
        q, k = (x.astype(mx.float32) if self.order is None else x.astype(mx.float32)[..., self.order] for x in (queries, self.keys))
        self.result = self.attention.attend(q, k, self.values.astype(mx.float32), scale)
        return self.result.astype(queries.dtype)


class _Spy:
    """Stands in for a layer: notes its arguments, gives `result` or what entered."""

    def __init__(self, layer, result=None, stops=False):
        self.layer, self.result, self.stops, self.arguments = layer, result, stops, None

    def __getattr__(self, name):  # models look at attributes of their layers, too
        return getattr(self.layer, name)

    def __call__(self, hidden, *args, **kwargs):
        self.hidden, self.arguments = hidden, (args, kwargs)
        if self.stops:
            raise _Reached
        return hidden if self.result is None else self.result


class LayerWalk:
    """What core.LiveModel runs: embed, layer and logits of a live model.  A context in which mlx_lm's attention knows our caches."""

    def __init__(self, model):
        self._model = model
        self._caches = own_caches(model)
        self._held = self._find_layers()
        self._layers = list(self._held)
        self._arguments = self._read_arguments()
        self.orders = [None] * len(self._layers)

    # Layers of the model --------------------------------------------------------------------------------------------------------------

    def embed(self, tokens):
        return self._run([_Spy(layer, stops=True) for layer in self._layers], tokens)[0].hidden

    def layer(self, index, hidden, attention):
        cache = _Attention(attention, self.orders[index])
        out = self._call(index, hidden, cache)
        if cache.result is None:
            raise ValueError(f"model: {self._name(index)} does not attend through scaled_dot_product_attention; {_ALLOCATORS}")
        return out.astype(mx.float32)

    def logits(self, hidden):
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        spies = [_Spy(self._layers[0], result=rows)] + [_Spy(layer) for layer in self._layers[1:]]
        logits = self._run(spies, mx.zeros(rows.shape[:2], mx.int32))[1]
        return logits.astype(mx.float32).reshape(*hidden.shape[:-1], -1)

    def live_layers(self, turns, hidden=None):
        """→ (core.LiveLayer of each layer, keys of a token); turns: whether keys are to be stored before RoPE."""
        hidden = self.embed(mx.zeros((1, 1), mx.int32)) if hidden is None else hidden
        layers, keys = [], None
        for index, cache in enumerate(self._caches):
            keys = self._keys(index, 0, hidden)
            radians, self.orders[index] = self._read_turning(index, hidden.shape[-1]) if turns else ([], None)
            window = cache.max_size if isinstance(cache, RotatingKVCache) else 0
            layers.append(core.LiveLayer(radians, window))
        return layers, keys

    def engine_model(self, tokenizer_first_token, turns):
        """→ core.LiveModel; turns: whether keys are to be stored before RoPE."""
        arguments = getattr(self._model, "args", None)
        hidden = self.embed(mx.zeros((1, 1), mx.int32))
        vocab_size = self.logits(hidden).shape[-1]
        layers, keys = self.live_layers(turns, hidden)
        return core.make_live_model(
            self,
            getattr(arguments, "model_type", type(self._model).__module__.rsplit(".", 1)[-1]),
            layers,
            hidden.shape[-1],
            getattr(arguments, "intermediate_size", None) or 4 * hidden.shape[-1],
            getattr(arguments, "num_attention_heads", None) or keys.shape[1],
            keys.shape[1],
            keys.shape[-1],
            vocab_size,
            getattr(arguments, "max_position_embeddings", None) or 2048,
            tokenizer_first_token,
        )

    # mlx_lm's attention ---------------------------------------------------------------------------------------------------------------

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.callback(know_our_caches(self._model))
        return self

    def __exit__(self, *problem):
        self._stack.close()

    # How the model calls its layers ---------------------------------------------------------------------------------------------------

    def _find_layers(self):
        first = self._model.layers[0]
        for module in self._model.modules():
            for value in module.values():
                if isinstance(value, list) and len(value) == len(self._caches) and any(entry is first for entry in value):
                    return value
        raise ValueError(f"model: {type(self._model).__module__} does not hold its layers in one list; {_ALLOCATORS}")

    def _run(self, spies, tokens):
        """The model with other layers → (the first of them, what the model gives or None)."""
        caches = [_Cache() for _ in self._layers]
        self._held[:] = spies
        try:
            out = self._model(tokens, cache=caches)
        except _Reached:
            out = None
        finally:
            self._held[:] = self._layers
        if spies[0].arguments is None:
            raise ValueError(f"model: {type(self._model).__module__} does not call its layers one after another; {_ALLOCATORS}")
        self._last_caches = caches
        return spies[0], out

    def _read_arguments(self):
        read = []
        for tokens in ([1, 2, 3], [3, 1, 2, 0]):
            spies = [_Spy(layer) for layer in self._layers]
            self._run(spies, mx.array([tokens], mx.int32))
            read.append([self._pattern(index, spy, len(tokens)) for index, spy in enumerate(spies)])
        for index, (one, other) in enumerate(zip(*read, strict=True)):
            if repr(one) != repr(other):
                raise ValueError(f"model: {self._name(index)} is called with what depends on the tokens; {_ALLOCATORS}")
        return read[0]

    # Arguments of a call with the cache and masks left out, to be put in again.
    def _pattern(self, index, spy, length):
        if spy.arguments is None:
            raise ValueError(f"model: {type(self._model).__module__} leaves {self._name(index)} out; {_ALLOCATORS}")
        caches = self._last_caches

        def replaced(value):
            if any(value is cache for cache in caches):
                return _Cache
            if isinstance(value, mx.array):
                if value.shape[-2:] == (length, length):
                    return None
                raise ValueError(f"model: {self._name(index)} is called with an array {value.shape} beside hidden states; {_ALLOCATORS}")
            return None if isinstance(value, str) else value

        args, kwargs = spy.arguments
        pattern = [replaced(value) for value in args], {name: replaced(value) for name, value in kwargs.items()}
        if _Cache not in pattern[0] and _Cache not in pattern[1].values():
            raise ValueError(f"model: {self._name(index)} is called without its cache; {_ALLOCATORS}")
        return pattern

    def _call(self, index, hidden, cache):
        args, kwargs = self._arguments[index]
        put_in = {name: cache if value is _Cache else value for name, value in kwargs.items()}
        return self._layers[index](hidden, *(cache if value is _Cache else value for value in args), **put_in)

    def _name(self, index):
        return layer_name(self._layers, index)

    # RoPE -----------------------------------------------------------------------------------------------------------------------------

    def _keys(self, index, position, hidden):
        cache = _KeysAt(position)
        with contextlib.suppress(_Reached):
            self._call(index, hidden, cache)
        return cache.seen[0]

    def _read_turning(self, index, hidden_size):
        """→ radians a position of each pair of dimensions, and the order of dimensions in which pair i of n is (i, i + n), or None."""
        hidden = mx.random.normal((16, 1, hidden_size), key=mx.random.key(index))

        def keys(position):
            k = np.asarray(self._keys(index, position, hidden).astype(mx.float32)).astype(np.float64)
            return k.reshape(-1, k.shape[-1])

        first, far = keys(0), keys(_FAR)
        scale = np.sqrt(np.mean(first**2))
        turned = np.nonzero(np.abs(far - first).max(axis=0) > 1e-4 * scale)[0]
        if turned.size == 0:
            return [], None
        dims = 2 * (int(turned.max()) // 2 + 1)
        for neighbours in (False, True):
            order = np.arange(first.shape[1])
            if neighbours:
                order[:dims] = np.concatenate([order[0:dims:2], order[1:dims:2]])
            radians = _frequencies(lambda position: _complex(keys(position)[:, order], dims))
            if radians is None:
                continue
            there = keys(777)[:, order]
            expected = _complex(first[:, order], dims) * np.exp(777j * radians)
            if np.abs(_complex(there, dims) - expected).max() < 2e-3 * scale and np.abs(there[:, dims:] - first[:, dims:]).max(initial=0) < 1e-3 * scale:
                return list(radians), mx.array(order) if neighbours else None
        raise ValueError(f"model: {self._name(index)} tells positions in a way that cannot be read from its keys; {_OTHER_METHOD}")


def _complex(x, dims):
    return x[:, : dims // 2] + 1j * x[:, dims // 2 : dims]


def _frequencies(pairs_at):
    """Radians a position of each pair, from what pairs at position 0, 1, 2, 4, … are; None if their lengths change."""
    first = pairs_at(0)
    radians, done = None, None
    position = 1
    while position <= _FAR and (done is None or not np.all(done)):
        there = pairs_at(position)
        lengths = np.linalg.norm(first, axis=0)
        if np.abs(np.linalg.norm(there, axis=0) - lengths).max() > 1e-3 * lengths.max():
            return None
        angle = np.angle(np.sum(there * np.conj(first), axis=0))
        if radians is None:
            radians, done = angle, np.zeros(angle.shape, bool)
        else:
            turns = np.round((radians * position - angle) / (2 * np.pi))
            radians = np.where(done, radians, (angle + 2 * np.pi * turns) / position)
        done = done | (np.abs(radians) * position > _MOST_RADIANS)
        position *= 2
    return np.where(np.abs(radians) < 1e-12, 1e-12, radians)
