"""What callers give: checked, and in the form that the extension module takes."""

import inspect
import os
import pathlib

import mlx.core as mx
import numpy as np

from ._load import core


def say(function, problem):
    """The documented signature, for errors."""
    return f"{problem}; expected {function.__name__}{inspect.signature(function)}"


def integer(name, value, least=1, most=2**31 - 1):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {value}")
    return int(value)


def number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    return float(value)


def seed(value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"seed: expected a whole number, got {type(value).__name__} {value!r}")
    if not 0 <= value < 2**64:
        raise ValueError(f"seed: expected a whole number from 0 to 2^64 - 1, got {value}")
    return int(value)


def device(value):
    if value not in ("cpu", "gpu"):
        raise ValueError(f'device: expected "cpu" or "gpu", got {value!r}')
    return core.resolve_device(value)


def texts(text):
    """A text, a path of one, or a list of these → [(name, text)]."""
    if text is None:
        return []
    several = list(text) if isinstance(text, (list, tuple)) else [text]
    named = []
    for i, some in enumerate(several):
        if isinstance(some, os.PathLike):
            path = pathlib.Path(some)
            named.append((path.name, path.read_text(encoding="utf-8")))
        elif isinstance(some, str):
            named.append((f"text {i + 1}", some))
        else:
            raise TypeError(f"text: expected a str, a path or a list of these, got {type(some).__name__}")
    return named


class Array:
    """A numpy or MLX array as float32 numpy; what is made of it goes back to the same kind."""

    def __init__(self, name, value):
        self.is_mlx = isinstance(value, mx.array)
        if not self.is_mlx and not isinstance(value, np.ndarray):
            raise TypeError(f"{name}: expected a numpy.ndarray or mlx.core.array, got {type(value).__name__}")
        if self.is_mlx:
            if not mx.issubdtype(value.dtype, mx.floating):
                raise TypeError(f"{name}: expected floating-point numbers, got {value.dtype}")
            value = np.asarray(value.astype(mx.float32))
        elif not np.issubdtype(value.dtype, np.floating):
            raise TypeError(f"{name}: expected floating-point numbers, got {value.dtype}")
        self.numpy = np.ascontiguousarray(value, dtype=np.float32)

    def same_kind(self, result):
        return mx.array(result) if self.is_mlx else result
