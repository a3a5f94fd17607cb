"""Inputs of the Python module's functions that no model gave."""
import numpy as np
from veloxquant_mlx.allocators.ratequant import SensitivityResult


def by_hand(*means):
    return {f"layer_{i}": SensitivityResult(f"layer_{i}", mean, 0.1) for i, mean in enumerate(means)}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
