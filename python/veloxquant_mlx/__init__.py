"""veloxquant: how a language model's key-value cache is stored in one to four bits.

    import veloxquant_mlx, mlx_lm  # in this order: MLX then multiplies with OpenBLAS

    model, tokenizer = mlx_lm.load(folder)
    plan = veloxquant_mlx.calibrate(model, tokenizer, bits=2.0)
    print(plan.summary())

allocators.ratequant and allocators.vecinfer are the documented API.
"""

from ._load import core
from . import allocators  # isort: skip  _load comes first
from .plans import Plan, calibrate
from ._packed import PackedKVCache, make_cache  # isort: skip

Tokenizer = core.Tokenizer
__version__ = core.__version__
__all__ = ["PackedKVCache", "Plan", "Tokenizer", "allocators", "calibrate", "make_cache"]
