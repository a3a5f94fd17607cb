"""The documented allocators: RateQuant (arXiv 2605.06675) and VecInfer (arXiv 2510.06175)."""

from . import ratequant, vecinfer

__all__ = ["ratequant", "vecinfer"]
