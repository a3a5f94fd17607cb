"""What callers give: checked, and in the form that the extension module takes."""

import functools
import inspect
import os
import pathlib

import mlx.core as mx
import numpy as np

from ._load import core


class WrongType(TypeError):
    """An argument that is not of the documented kind."""


def documented(function):
    """Arguments that do not fit the signature, in number, name or kind: TypeError with the problem and the signature."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            problem = error
        else:
            try:
                return function(*args, **kwargs)
            except WrongType as error:
                problem = error
        raise TypeError(f"{problem}; expected {function.__name__}{signature}") from None

    return checked


def integer(name, value, least=1, most=2**31 - 1):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise WrongType(f"{name}: expected a whole number, got {type(value).__name__} {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {value}")
    return int(value)


def number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise WrongType(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    return float(value)


def seed(value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise WrongType(f"seed: expected a whole number, got {type(value).__name__} {value!r}")
    if not 0 <= value < 2**64:
        raise ValueError(f"seed: expected a whole number from 0 to 2^64 - 1, got {value}")
    return int(value)


def device(value):
    if value not in ("cpu", "gpu"):
        raise ValueError(f'device: expected "cpu" or "gpu", got {value!r}')
    return core.resolve_device(value)


def word(name, value, optional=False):
    if not (isinstance(value, str) or optional and value is None):
        raise WrongType(f"{name}: expected a str, got {type(value).__name__} {value!r}")
    return value


def numbers(name, values):
    if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise WrongType(f"{name}: expected a list of numbers, got {type(values).__name__}")
    return [number(name, value.item() if isinstance(value, mx.array) else value) for value in values]


def texts(text):
    """A text, a path of one, or a list of these → [(name, text)]."""
    if text is None:
        return []
    several = list(text) if isinstance(text, (list, tuple)) else [text]
    named = []
    for i, some in enumerate(several):
        if isinstance(some, os.PathLike):
            path = pathlib.Path(some)
            try:
                named.append((path.name, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError as error:
                raise ValueError(f"text: {path}: expected UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}") from None
        elif isinstance(some, str):
            try:
                some.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text: expected Unicode, got a lone surrogate at {error.start}") from None
            named.append((f"text {i + 1}", some))
        else:
            raise WrongType(f"text: expected a str, a path or a list of these, got {type(some).__name__}")
    return named


class Array:
    """A numpy or MLX array as float32 numpy; what is made of it goes back to the same kind."""

    def __init__(self, name, value):
        self.is_mlx = isinstance(value, mx.array)
        if not self.is_mlx and not isinstance(value, np.ndarray):
            raise WrongType(f"{name}: expected a numpy.ndarray or mlx.core.array, got {type(value).__name__}")
        if self.is_mlx:
            if not mx.issubdtype(value.dtype, mx.floating):
                raise WrongType(f"{name}: expected floating-point numbers, got {value.dtype}")
            value = np.asarray(value.astype(mx.float32))
        elif not np.issubdtype(value.dtype, np.floating):
            raise WrongType(f"{name}: expected floating-point numbers, got {value.dtype}")
        self.numpy = np.asarray(value, dtype=np.float32, order="C")
        wrong = self.numpy[~np.isfinite(self.numpy)]
        if wrong.size:
            raise ValueError(f"{name}: expected finite values, got {wrong[0]}")

    def same_kind(self, result):
        return mx.array(result) if self.is_mlx else result
