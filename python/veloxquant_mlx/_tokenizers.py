"""Tokenizers of mlx_lm, of Hugging Face, and our own."""

import weakref

import numpy as np

from ._load import core

_parsed = weakref.WeakKeyDictionary()


def is_tokenizer(value):
    return isinstance(value, core.TextEncoder) or callable(getattr(value, "encode", None)) and not isinstance(value, (str, bytes))


def encoder(tokenizer, rows=None):
    """→ what the extension module reads texts with.

    tokenizer: mlx_lm's TokenizerWrapper, one of transformers or of tokenizers, or veloxquant_mlx.Tokenizer.
    rows: tokens that the model has, where known: for tokenizers that are not asked how many they have.
    """
    if isinstance(tokenizer, core.TextEncoder):
        return tokenizer
    if not is_tokenizer(tokenizer):
        raise TypeError(
            "tokenizer: expected mlx_lm's TokenizerWrapper, a Hugging Face tokenizer or a veloxquant_mlx.Tokenizer, got "
            f"{type(tokenizer).__name__}"
        )
    try:
        made = _parsed[tokenizer]
    except (KeyError, TypeError):
        made = _parse(tokenizer)
        try:
            _parsed[tokenizer] = made
        except TypeError:  # no weak references
            pass
    return made or core.CallableEncoder(lambda text: _encode(tokenizer, text, rows), _prefix(tokenizer, rows))


def vocabulary_size(tokenizer):
    """One more than the highest id, or None if it does not say."""
    if isinstance(tokenizer, core.Tokenizer):
        return tokenizer.vocabulary_size
    made = encoder(tokenizer)
    if isinstance(made, core.Tokenizer):
        return made.vocabulary_size
    vocabulary = getattr(tokenizer, "get_vocab", dict)()
    return max(vocabulary.values()) + 1 if vocabulary else None


def special_token(tokenizer, name):
    """bos_token_id or eos_token_id, where the tokenizer has one."""
    value = getattr(tokenizer, name, None)
    return value if isinstance(value, int) else None


def folder_of(tokenizer):
    """Where the tokenizer was read, as far as it says."""
    return getattr(tokenizer, "name_or_path", None) or None


def _parse(tokenizer):
    # The fast tokenizers have the JSON that ours reads, and ours reads it without Python.
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    inner = getattr(inner, "backend_tokenizer", inner)
    if not hasattr(inner, "to_str"):
        return None
    try:
        return core.Tokenizer.parse(inner.to_str(), type(tokenizer).__name__)
    except RuntimeError:  # a part that ours does not have
        return None


def _prefix(tokenizer, rows):
    """What it puts before a text."""
    text = _encode(tokenizer, "a", rows)
    whole = _encode(tokenizer, "a", rows, add_special_tokens=True)
    for begin in range(len(whole) - len(text) + 1):
        if whole[begin : begin + len(text)] == text:
            return whole[:begin]
    return []


def _encode(tokenizer, text, rows, add_special_tokens=False):
    found = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    tokens = list(getattr(found, "ids", found))
    for token in tokens:
        if not isinstance(token, (int, np.integer)):
            raise TypeError(f"tokenizer: expected a list of token ids, got {type(found).__name__} with {token!r}")
        if not 0 <= token < (rows or 2**31):
            raise ValueError(f"tokenizer: the model has {rows or 2**31} tokens, got token {token}")
    return tokens
