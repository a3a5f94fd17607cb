"""How mlx_lm's attention finds our caches: it looks at nothing of a cache but whether that has `bits`."""

import functools
import sys

_NAME = "scaled_dot_product_attention"


class OurAttention:
    """A cache that attends itself: attend(queries, keys, values, scale), as update_and_fetch has given keys and values."""


def know_our_caches(model):
    """Make scaled_dot_product_attention of mlx_lm's modules, and of the model's own, know such caches.  Returns what undoes it."""
    changed = []
    for name, module in list(sys.modules.items()):
        attend = getattr(module, _NAME, None)
        ours = name.startswith("mlx_lm.models.") or name == type(model).__module__
        if ours and callable(attend) and not hasattr(attend, "_knows_our_caches"):
            setattr(module, _NAME, _for_our_caches(attend))
            changed.append((module, attend))

    def undo():
        for module, attend in changed:
            setattr(module, _NAME, attend)

    return undo


def _for_our_caches(attend):
    @functools.wraps(attend)
    def scaled_dot_product_attention(queries, keys, values, cache=None, *args, **kwargs):
        if not isinstance(cache, OurAttention):
            return attend(queries, keys, values, cache, *args, **kwargs)
        return _attend(cache, queries, keys, values, *args, **kwargs)

    scaled_dot_product_attention._knows_our_caches = True
    return scaled_dot_product_attention


def _attend(cache, queries, keys, values, scale, mask=None, sinks=None):
    # The mask is the causal one: such a cache knows what a query sees.
    if sinks is not None:
        raise ValueError("model: attention with sinks of its own is not read: veloxquant_mlx.allocators run such a model, calibrate does not")
    return cache.attend(queries, keys, values, scale)
