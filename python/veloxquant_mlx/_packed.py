"""Packed caches for mlx_lm: codes, and attention over them."""

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ._attention import OurAttention, know_our_caches
from ._layer_walk import LayerWalk
from ._load import core
from ._own_forward import in_float32
from .plans import Plan


class PackedKVCache(OurAttention):
    """Keys and values of one layer, as a plan stores them; in mlx_lm's list of caches.  Holds codes only.

    It cannot be trimmed, and is for one batch of sequences without padding.  Not to be used from two threads at once.
    """

    def __init__(self, cache, order):
        self._cache, self._order = cache, order

    @property
    def offset(self):
        return self._cache.offset

    @property
    def nbytes(self):
        """Allocated for tokens."""
        return self._cache.nbytes

    @property
    def state(self):
        return self._cache.pending  # mlx_lm evaluates it where it needs no result

    def update_and_fetch(self, keys, values):
        return keys, values  # attend() takes them

    def attend(self, queries, keys, values, scale):
        q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
        if self._order is not None:
            q, k = q[..., self._order], k[..., self._order]
        return self._cache.attend(q, k, v, scale).astype(queries.dtype)

    def make_mask(self, *args, **kwargs):
        return None

    def is_trimmable(self):
        return False

    def size(self):
        return self.offset

    def empty(self):
        return self.offset == 0


def make_cache(model, plan):
    """Caches for mlx_lm: generate(..., prompt_cache=make_cache(model, plan)).

    model: a live mlx_lm model.  plan: a Plan for it, of a method that stores tokens one by one (all but "kivi").  The caches are for
    the device that is the default when they are made.
    Layers that the plan leaves as they are keep the cache that the model gives them.  Returns a list, one for each layer: make a new one
    for each sequence.
    Raises ValueError or TypeError for other models and plans, RuntimeError that names what differs for a plan of another model.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a veloxquant_mlx.Plan, got {type(plan).__name__}")
    caches = make_prompt_cache(model)
    with in_float32(model), LayerWalk(model) as walk:
        layers, keys = walk.live_layers(turns=plan.provenance["method"] == "rotated_pq")
    architecture = getattr(getattr(model, "args", None), "model_type", plan.model["architecture"])
    plan._plan.check(architecture, len(caches), keys.shape[1], keys.shape[-1])
    know_our_caches(model)
    packed = core.packed_caches(plan._plan, layers)
    return [own if cache is None else PackedKVCache(cache, order) for own, cache, order in zip(caches, packed, walk.orders, strict=True)]
