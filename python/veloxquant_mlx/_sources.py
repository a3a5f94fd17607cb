"""What stands behind the argument `model`: a folder, or a live model."""

import os
import pathlib

from . import _inputs
from ._live import engine_model, source_hashes
from ._load import core
from ._own_forward import OwnForward, check_tokens, rows_of
from ._tokenizers import encoder, is_tokenizer


class Source:
    """engine: a core.Model and its core.TextEncoder, or None where own_forward is what runs; a context in which it may."""

    def __init__(self, model, tokenizer, device):
        self.device = _inputs.device(device)
        self.engine = self.own_forward = self.hashes = None
        if type(model) in (list, tuple, dict) or isinstance(tokenizer, (list, tuple, dict, int, float)):  # nn.Module is a dict
            raise _inputs.WrongType(f"got {type(model).__name__} and {type(tokenizer).__name__} for model and tokenizer")
        if isinstance(model, (str, os.PathLike)):
            self._from_folder(pathlib.Path(model), tokenizer)
        else:
            if not is_tokenizer(tokenizer):
                raise _inputs.WrongType(f"tokenizer: got {type(tokenizer).__name__} for a live model")
            self._from_live(model, tokenizer)

    def __enter__(self):
        if self.own_forward is not None:
            self.own_forward.__enter__()
        return self

    def __exit__(self, *problem):
        if self.own_forward is not None:
            self.own_forward.__exit__(*problem)

    def _from_folder(self, folder, tokenizer):
        self.engine = core.Model.load(folder)
        self.encoder = core.Tokenizer.load(folder) if tokenizer is None else encoder(tokenizer, self.engine.vocab_size)
        size = getattr(self.encoder, "vocabulary_size", 0)
        if size > self.engine.vocab_size:
            raise ValueError(
                f"tokenizer: it has ids up to {size - 1}, and the model {self.engine.vocab_size} tokens: they are not of one model"
            )

    def _from_live(self, model, tokenizer):
        check_tokens(model, tokenizer)
        self.encoder = encoder(tokenizer, rows_of(model))
        self.engine = engine_model(model, tokenizer, self.device)
        if self.engine is None:
            self.own_forward = OwnForward(model, tokenizer, self.device)
            return
        identity = self.engine.identity
        self.hashes = source_hashes(tokenizer, identity["architecture"], identity["weights_hash"])
