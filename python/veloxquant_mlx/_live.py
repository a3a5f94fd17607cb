"""Live mlx_lm models for the C++ engine: their arrays and their arguments, where it has their family."""

import dataclasses
import hashlib
import json
import pathlib
import warnings

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from ._load import core
from ._tokenizers import folder_of, special_token

# What mlx_lm's arguments leave out of config.json and the engine wants to know.
_BESIDE_ARGUMENTS = ("hidden_act", "hidden_activation", "max_position_embeddings")

# No window: longer than any sequence.
_NO_WINDOW = 1 << 30

# Mean KL, in nats, that rounding to bfloat16 does not reach and another architecture does not stay below.
_SAME_MODEL_KL = 0.05


def own_caches(model):
    """The caches that a model makes by its own code: model.make_cache may be set to make ours."""
    make = getattr(type(model), "make_cache", None)
    return make(model) if make else [KVCache() for _ in model.layers]


def engine_model(model, tokenizer, device):
    """The engine's form of a live model, or None where it does not have the family.

    The arrays are shared where that is possible.  Where the engine says something else than the model itself, the model is right.
    """
    arguments = getattr(model, "args", None)
    if not dataclasses.is_dataclass(arguments) or getattr(arguments, "model_type", None) not in core.families():
        return None
    try:
        engine = core.Model.from_arrays(
            json.dumps(_config(model, arguments, tokenizer)), dict(tree_flatten(model.parameters())), "the live model", device
        )
    except RuntimeError as error:
        warnings.warn(f"the live model runs by its own code, which takes longer: {error}", stacklevel=6)
        return None
    if not _says_the_same(model, engine, device):
        warnings.warn(
            f"the live model says something else than the engine's {arguments.model_type}: it runs by its own code, which takes longer",
            stacklevel=6,
        )
        return None
    return engine


def source_hashes(tokenizer, architecture, live_weights_hash):
    """(config_hash, weights_hash) of the folder that the model was read from, "" for what is not known to be the same."""
    folder, config = _source_config(tokenizer, architecture)
    if config is None:
        return "", ""
    try:
        weights = core.weights_hash(folder)
    except RuntimeError:
        weights = ""
    data = (folder / "config.json").read_bytes()
    return hashlib.sha256(data).hexdigest(), weights if weights == live_weights_hash else ""


def first_token(model, tokenizer):
    """What the model's own text begins with, or None: as for its folder, where that is known."""
    source = _source_config(tokenizer, getattr(getattr(model, "args", None), "model_type", None))[1] or {}
    for name in ("bos_token_id", "eos_token_id"):
        token = source.get(name)
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int):
            return token
    token = special_token(tokenizer, "bos_token_id")
    return special_token(tokenizer, "eos_token_id") if token is None else token


def _source_config(tokenizer, model_type):
    # The tokenizer remembers where it was read, and mlx_lm reads both from one folder.
    name = folder_of(tokenizer)
    folder = pathlib.Path(name) if name else None
    if folder is None or not (folder / "config.json").is_file():
        return None, None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, None
    return (folder, config) if config.get("model_type") == model_type else (None, None)


def _config(model, arguments, tokenizer):
    config = dataclasses.asdict(arguments)
    config["num_hidden_layers"] = len(model.layers)
    if "sliding_window" not in config:  # mlx_lm leaves the windows of some families out
        config["sliding_window"] = _NO_WINDOW
        config["layer_types"] = ["full_attention"] * len(model.layers)
    source = _source_config(tokenizer, arguments.model_type)[1] or {}
    for name in _BESIDE_ARGUMENTS:
        if config.get(name) is None and source.get(name) is not None:
            config[name] = source[name]
    config["bos_token_id"], config["eos_token_id"] = first_token(model, tokenizer), None
    packings = {
        name: {"group_size": module.group_size, "bits": module.bits, "mode": getattr(module, "mode", "affine")}
        for name, module in model.named_modules()
        if hasattr(module, "bits") and hasattr(module, "group_size")
    }
    config.pop("quantization_config", None)
    config["quantization"] = {**next(iter(packings.values())), **packings} if packings else None
    return config


def _says_the_same(model, engine, device):
    tokens = mx.array(np.random.default_rng(0).integers(0, engine.vocab_size, (1, 32)), mx.int32)
    with mx.stream(mx.Device(mx.cpu if device == "cpu" else mx.gpu)):
        live = _log_probabilities(model(tokens))
        ours = _log_probabilities(engine.logits(tokens, device))
        kl = mx.mean(mx.sum(mx.exp(live) * (live - ours), axis=-1)).item()
    return kl < _SAME_MODEL_KL


def _log_probabilities(logits):
    x = logits.astype(mx.float32)
    return x - mx.logsumexp(x, axis=-1, keepdims=True)
