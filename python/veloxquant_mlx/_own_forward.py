"""Live mlx_lm models of families that the C++ engine does not have: the model's own forward runs, with caches of ours in its list."""

import contextlib
import tempfile

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from ._live import first_token, own_caches
from ._load import core
from ._tokenizers import encoder, vocabulary_size

# Tokens that go through the model together, as in the engine.
_STEP_TOKENS = 4096


class PerturbingCache(KVCache):
    """Puts Gaussian noise on keys and values."""

    def __init__(self, deviations, seeds):
        super().__init__()
        self._deviations, self._seeds = deviations, seeds

    def update_and_fetch(self, keys, values):
        noisy = [
            core.add_gaussian_noise(x.astype(mx.float32), deviation, seed).astype(x.dtype)
            for x, deviation, seed in zip((keys, values), self._deviations, self._seeds, strict=True)
        ]
        return super().update_and_fetch(*noisy)


class OwnForward:
    """A live model, run by its own code; a context in which its parameters are float32.

    Activations rounded to bfloat16 change a model by more than the noise and the storage that are measured do.
    """

    def __init__(self, model, tokenizer, device):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        if not hasattr(model, "layers") or not callable(model):
            raise TypeError(f"model: expected an mlx_lm model or the folder of one, got {type(model).__name__}")
        self._check_caches()
        self.num_layers = len(own_caches(model))
        keys = self._first_keys()
        self.num_kv_heads, self.head_dim = keys.shape[1], keys.shape[-1]

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(in_float32(self.model))
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _check_caches(self):
        for i, cache in enumerate(own_caches(self.model)):
            # Sliding layers see their window by the mask, as long as a sequence is read in one go.
            if type(cache) not in (KVCache, RotatingKVCache):
                held = [type(part).__name__ for part in cache.caches] if isinstance(cache, CacheList) else [type(cache).__name__]
                raise ValueError(
                    f"model: {layer_name(self.model.layers, i)} keeps {', '.join(held)}: expected layers that keep keys and values of "
                    "every token (KVCache)"
                )

    def _first_keys(self):
        caches = [KVCache() for _ in range(self.num_layers)]
        self.forward(mx.zeros((1, 2), mx.int32), caches)
        shapes = set()
        for i, cache in enumerate(caches):
            if cache.empty():
                raise ValueError(f"model: {layer_name(self.model.layers, i)} keeps no keys and values")
            keys, values = cache.keys_and_values()
            if keys.shape != values.shape:
                raise ValueError(
                    f"model: {layer_name(self.model.layers, i)} keeps keys {keys.shape} and values {values.shape}, as multi-head latent "
                    "attention (MLA) does: expected the same shape"
                )
            shapes.add(keys.shape)
        if len(shapes) > 1:
            raise ValueError(f"model: expected layers of one shape of keys, got {sorted(shapes)}")
        return caches[0].keys_and_values()[0]

    def forward(self, tokens, caches):
        with mx.stream(mx.Device(mx.cpu if self.device == "cpu" else mx.gpu)):
            return self.model(tokens, cache=caches)

    # Samples [num_samples, length] int32 of texts, or of the model's own text.
    def samples(self, texts, num_samples, length, seed, progress):
        if texts:
            tokenize = encoder(self.tokenizer, rows_of(self.model))
            return core.cut_samples([tokenize.encode(text) for _, text in texts], num_samples, length, tokenize.prefix)
        return self._own_text(num_samples, length, seed, progress)

    def _own_text(self, num_samples, length, seed, progress):
        first = first_token(self.model, self.tokenizer)
        if first is None:
            raise ValueError("tokenizer: it names no bos_token_id and no eos_token_id to begin the model's own text with: pass text=")
        key = mx.random.key(seed)
        caches = own_caches(self.model)
        tokens = [mx.full((num_samples, 1), first, mx.int32)]
        for i in range(1, length):
            logits = self.forward(tokens[-1], caches)[:, -1].astype(mx.float32)
            key, draw = mx.random.split(key)
            tokens.append(mx.random.categorical(logits, key=draw)[:, None].astype(mx.int32))
            mx.eval(tokens[-1], [cache.state for cache in caches])
            progress("writing own text", i, length - 1)
        return np.array(mx.concatenate(tokens, axis=1))

    def steps(self, samples):
        """[begin, end) of samples that go through the model together."""
        count = max(1, _STEP_TOKENS // samples.shape[1])
        return [(begin, min(begin + count, len(samples))) for begin in range(0, len(samples), count)]

    def observe(self, samples, progress):
        """→ Observations: keys as stored, and values, of every layer."""
        kept = Observations(self.num_layers, len(samples), self.num_kv_heads, samples.shape[1], self.head_dim)
        steps = self.steps(samples)
        for i, (begin, end) in enumerate(steps):
            caches = [KVCache() for _ in range(self.num_layers)]
            self.forward(mx.array(samples[begin:end]), caches)  # lazy: the head is not computed
            for layer, cache in enumerate(caches):
                kept.set(layer, begin, *cache.keys_and_values())
            progress("reading samples", i + 1, len(steps))
        return kept

    def output_changes(self, samples, deviations, seed, progress):
        """√(2·KL) of each sample for noise in each layer → [num_layers, num_samples]."""
        changes = np.zeros((self.num_layers, len(samples)))
        steps = self.steps(samples)
        done, total = 0, len(steps) * (self.num_layers + 1)
        for step, (begin, end) in enumerate(steps):
            tokens = mx.array(samples[begin:end])
            clean = self.forward(tokens, [KVCache() for _ in range(self.num_layers)])
            mx.eval(clean)
            done += 1
            progress("perturbing layers", done, total)
            for layer in range(self.num_layers):
                seeds = [core.noise_seed(seed, layer, step, side) for side in ("keys", "values")]
                caches = [KVCache() for _ in range(self.num_layers)]
                caches[layer] = PerturbingCache(deviations[layer], seeds)
                changed = self.forward(tokens, caches)
                for row in range(end - begin):
                    changes[layer, begin + row] = np.sqrt(2 * max(0.0, _mean_kl(clean[row], changed[row])))
                done += 1
                progress("perturbing layers", done, total)
        if not np.all(np.isfinite(changes)):
            layer = int(np.argwhere(~np.isfinite(changes))[0][0])
            raise ValueError(f"layer_{layer}: expected a finite change of the output, got {changes[layer].max()}")
        return changes


class Observations:
    """Keys and values [num_samples, num_kv_heads, length, head_dim] of every layer, float32, in a file."""

    def __init__(self, num_layers, *shape):
        with tempfile.TemporaryFile() as file:  # the mapping holds it
            self._arrays = np.memmap(file, np.float32, "w+", shape=(num_layers, 2, *shape))

    def set(self, layer, begin, keys, values):
        for side, x in enumerate((keys, values)):
            x = np.asarray(x.astype(mx.float32))
            if not np.all(np.isfinite(x)):
                raise ValueError(f"layer_{layer}: the model's {('keys', 'values')[side]} are not all finite")
            self._arrays[layer, side, begin : begin + len(x)] = x

    def keys(self, layer):
        return self._arrays[layer, 0]

    def values(self, layer):
        return self._arrays[layer, 1]


def rows_of(model):
    """Tokens that the model has, or None if it does not say."""
    return getattr(getattr(model, "args", None), "vocab_size", None)


def check_tokens(model, tokenizer):
    """ValueError unless the tokenizer's ids fit the model's embedding."""
    rows, tokens = rows_of(model), vocabulary_size(tokenizer)
    if rows is not None and tokens is not None and tokens > rows:
        raise ValueError(f"tokenizer: it has ids up to {tokens - 1}, and the model {rows} tokens: they are not of one model")


@contextlib.contextmanager
def in_float32(model):
    """A context in which a model's parameters are float32."""
    parameters = model.parameters()
    model.update(tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, parameters))
    try:
        yield
    finally:
        model.update(parameters)


def layer_name(layers, index):
    """For errors: the number of a layer and its type."""
    return f"layer {index} ({type(layers[index]).__name__ if index < len(layers) else '?'})"


def _mean_kl(clean, changed):
    p, q = (x.astype(mx.float32) for x in (clean, changed))
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (p, q))
    return mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1)).item()
