"""veloxquant: how a language model's key-value cache is stored in one to four bits.

    import mlx_lm, veloxquant_mlx

    model, tokenizer = mlx_lm.load(folder)
    plan = veloxquant_mlx.calibrate(model, tokenizer, bits=2.0)
    print(plan.summary())

allocators.ratequant and allocators.vecinfer are the documented API.  On the CPU of a Linux machine the import has MLX multiply with OpenBLAS.
"""

from . import allocators
from ._load import core
from ._packed import BatchPackedKVCache, PackedKVCache, load_cache, make_cache
from .plans import Plan, calibrate

Tokenizer = core.Tokenizer
__version__ = core.__version__
__all__ = ["BatchPackedKVCache", "PackedKVCache", "Plan", "Tokenizer", "allocators", "calibrate", "load_cache", "make_cache"]
