"""Packed caches for mlx_lm: codes, and attention over them."""

import os
import weakref

import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache

from ._attention import OurAttention, know_our_caches
from ._layer_walk import LayerWalk
from ._live import own_caches
from ._load import core
from ._own_forward import in_float32
from .plans import Plan


class _Storage:
    """How a plan stores the layers of a model: what their caches share."""

    # By the plan's identity, which saved caches name, and the device.  Kept, so that they can be loaded: codebooks of a plan are some
    # megabytes.
    known = {}

    @staticmethod
    def key(identity):
        return identity, str(mx.default_device())

    def __init__(self, model, plan):
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a veloxquant_mlx.Plan, got {type(plan).__name__}")
        with in_float32(model), LayerWalk(model) as walk:
            layers, keys = walk.live_layers(turns=plan.provenance["method"] == "rotated_pq")
        architecture = getattr(getattr(model, "args", None), "model_type", plan.model["architecture"])
        plan._plan.check(architecture, len(layers), keys.shape[1], keys.shape[-1])
        self.caches, self.orders, self._model = core.LiveCaches(plan._plan, layers), walk.orders, weakref.ref(model)
        self.identity = self.caches.identity

    @staticmethod
    def of(model, plan):
        known = _Storage.known.get(_Storage.key(getattr(plan, "identity", None)))
        if known is None or known._model() is not model:
            known = _Storage(model, plan)
            _Storage.known[_Storage.key(known.identity)] = known
        return known


class _Checksum(str):
    """Made when it is read: after each part of a prompt mlx_lm asks for states only to evaluate their arrays."""

    def __new__(cls, make):
        text = super().__new__(cls)
        text._make = make
        return text

    def __iter__(self):
        return iter(self._make())

    def __eq__(self, other):
        return self._make() == other

    __hash__ = None


class PackedKVCache(OurAttention):
    """Keys and values of one layer, as a plan stores them; in mlx_lm's list of caches.  Holds codes only.

    A token that trim() brings back into the window stays as the codes that it has become.  Not to be used from two threads at once:
    RuntimeError where that is seen.
    """

    def __init__(self, storage, layer, cache=None):
        self._storage, self._layer = storage, layer
        self._cache = storage.caches.cache(layer) if cache is None else cache

    @property
    def offset(self):
        return self._cache.offset

    @property
    def nbytes(self):
        """Allocated for tokens."""
        return self._cache.nbytes

    def size(self):
        return max(self._cache.tokens, default=0)

    def empty(self):
        return self.size() == 0

    # Attention ------------------------------------------------------------------------------------------------------------------------

    def update_and_fetch(self, keys, values):
        return keys, values  # attend() takes them

    def attend(self, queries, keys, values, scale):
        return self._attend(queries, keys, values, scale, [])

    def _attend(self, queries, keys, values, scale, own):
        q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
        order = self._storage.orders[self._layer]
        if order is not None:
            q, k = q[..., order], k[..., order]
        return self._cache.attend(q, k, v, scale, own).astype(queries.dtype)

    def make_mask(self, *args, **kwargs):
        return None  # the cache knows what a query sees

    # Copies, files --------------------------------------------------------------------------------------------------------------------

    def is_trimmable(self):
        return True

    def trim(self, n):
        return self._cache.trim(max(int(n), 0))

    def __deepcopy__(self, memo):
        return type(self)(self._storage, self._layer, self._cache.clone())

    @property
    def state(self):
        """For mlx_lm's files: the arrays, and what they are good for."""
        arrays = self._cache.state()
        return {
            "plan": self._storage.identity,
            "layer": self._layer,
            "checksum": _Checksum(lambda: core.state_checksum(self._name(self._storage.identity, self._layer), arrays)),
            "arrays": arrays,
        }

    @classmethod
    def from_state(cls, state):
        """Raises ValueError for a plan of which no cache was made in this process, RuntimeError for what is damaged."""
        try:
            identity, layer, arrays = state["plan"], int(state["layer"]), dict(state["arrays"])
            whole = core.state_checksum(cls._name(identity, layer), arrays) == state["checksum"]
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"saved cache: expected plan, layer, checksum and arrays: {error!r}") from None
        if not whole:
            raise RuntimeError(f"saved cache: layer_{layer}: the checksum does not match: it is damaged, or of another version")
        storage = _Storage.known.get(_Storage.key(identity))
        if storage is None:
            raise ValueError(f"saved cache: made with the plan {identity}: make_cache(model, plan) or load_cache() with it first")
        cache = cls(storage, layer)
        cache._cache.restore(arrays)
        return cache

    @staticmethod
    def _name(identity, layer):
        return f"packed cache 1, layer {layer}, {identity}"

    # Batches --------------------------------------------------------------------------------------------------------------------------

    @classmethod
    def merge(cls, caches):
        """One cache of all their sequences."""
        first, *others = caches
        return BatchPackedKVCache(first._storage, first._layer, first._joined(others))

    def _joined(self, others):
        for other in others:
            if not isinstance(other, PackedKVCache) or (other._storage, other._layer) != (self._storage, self._layer):
                raise ValueError(f"expected caches of layer_{self._layer} and the plan {self._storage.identity}")
        return self._cache.join([other._cache for other in others])


class BatchPackedKVCache(PackedKVCache):
    """The same for sequences of different lengths, each of which is stored as it would be alone.

    As mlx_lm's BatchKVCache: prepare() announces padding, to the left or to the right, of tokens that come; it is not stored.
    """

    def __init__(self, storage, layer, cache=None):
        super().__init__(storage, layer, cache)
        self._left = self._right = None  # tokens, of each sequence, that are to be skipped, and that are then its own

    @property
    def offset(self):
        """Positions of the tokens that come next, of each sequence; those of padding are below."""
        tokens = self._cache.tokens
        return mx.array([count - skipped for count, skipped in zip(tokens, self._left or [0] * len(tokens), strict=True)])

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        if left_padding is not None:
            if not self.empty():
                raise ValueError("left_padding: expected before the first tokens")
            self._left = [int(skipped) for skipped in left_padding]
        if right_padding is not None and max(right_padding) > 0:
            self._right = [int(length) for length in lengths]

    def finalize(self):
        self._left = self._right = None

    def attend(self, queries, keys, values, scale):
        batch, tokens = keys.shape[0], keys.shape[2]
        left = [min(skipped, tokens) for skipped in self._left or [0] * batch]
        own = [min(tokens - skipped, rest) for skipped, rest in zip(left, self._right or [tokens] * batch, strict=True)]
        if self._left:
            self._left = [skipped - some for skipped, some in zip(self._left, left, strict=True)]
            if not any(self._left):
                self._left = None
        if self._right:
            self._right = [rest - some for rest, some in zip(self._right, own, strict=True)]
        # The cache takes the last ones.
        shifts = [tokens - skipped - count for skipped, count in zip(left, own, strict=True)]
        if not any(shifts):
            return self._attend(queries, keys, values, scale, own)
        turned = (_rolled(x, shifts) for x in (queries, keys, values))
        return _rolled(self._attend(*turned, scale, own), [-shift for shift in shifts])

    def filter(self, batch_indices):
        indices = [int(i) for i in batch_indices]
        self._cache = self._cache.select(indices)
        self._left, self._right = ([x[i] for i in indices] if x else None for x in (self._left, self._right))

    def extend(self, other):
        if self._left or self._right or other._left or other._right:
            raise ValueError("extend: expected no padding that is still to come")
        self._cache = self._joined([other])

    def extract(self, idx):
        return PackedKVCache(self._storage, self._layer, self._cache.select([int(idx)]))

    def __deepcopy__(self, memo):
        copy = super().__deepcopy__(memo)
        copy._left, copy._right = self._left, self._right  # lists that are replaced, never changed
        return copy


def _rolled(x, shifts):
    return mlx_lm_cache.dynamic_roll(x, mx.array(shifts)[:, None], axis=2)


# mlx_lm looks classes of saved caches up among its own.
mlx_lm_cache.PackedKVCache, mlx_lm_cache.BatchPackedKVCache = PackedKVCache, BatchPackedKVCache


def make_cache(model, plan):
    """Caches for mlx_lm: generate(..., prompt_cache=make_cache(model, plan)).

    model: a live mlx_lm model.  plan: a Plan for it, of a method that stores tokens one by one (all but "kivi").  The caches are for
    the device that is the default when they are made.
    Layers that the plan leaves as they are keep the cache that the model gives them.  Returns a list, one for each layer: make a new one
    for each sequence.  mlx_lm's own functions trim, copy, save, load and batch it; files of save_prompt_cache() load where make_cache()
    was called with the same plan, or by load_cache().
    Raises ValueError or TypeError for other models and plans, RuntimeError that names what differs for a plan of another model.
    """
    storage = _Storage.of(model, plan)
    know_our_caches(model)
    packed = [storage.caches.cache(layer) for layer in range(len(storage.orders))]
    return [
        own if cache is None else PackedKVCache(storage, layer, cache)
        for layer, (own, cache) in enumerate(zip(own_caches(model), packed, strict=True))
    ]


def load_cache(file, model, plan, return_metadata=False):
    """The caches that mlx_lm's save_prompt_cache(file, caches, metadata) wrote, made by make_cache(model, plan).

    Returns a list; with return_metadata (list, metadata).  Raises RuntimeError that names the file and what is wrong: damage, another
    plan, another model.
    Layers that the plan leaves as they are have no checksum.
    """
    path = os.fspath(file)
    core.check_safetensors(path)
    expected = make_cache(model, plan)
    try:
        caches, metadata = mlx_lm_cache.load_prompt_cache(path, return_metadata=True)
        for layer, (cache, like) in enumerate(zip(caches, expected, strict=True)):
            if isinstance(like, PackedKVCache) and isinstance(cache, PackedKVCache):
                if cache._storage is not like._storage:
                    raise ValueError(f"expected caches of the plan {like._storage.identity}, got {cache._storage.identity}")
                if cache._layer != layer:
                    raise ValueError(f"layer_{layer}: got the cache of layer_{cache._layer}")
            elif type(cache) is not type(like):
                raise ValueError(f"layer_{layer}: expected a {type(like).__name__}, got a {type(cache).__name__}")
    except Exception as error:  # whatever a damaged file leads mlx_lm to
        raise RuntimeError(f"{path}: {error if str(error) else type(error).__name__}") from error
    return (caches, metadata) if return_metadata else caches
