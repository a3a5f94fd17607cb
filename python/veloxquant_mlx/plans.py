"""Plans: how every head's keys and values are stored, and how they are made."""

import contextlib
import functools
import json
import os

from . import _inputs
from ._layer_walk import LayerWalk
from ._live import first_token
from ._load import core
from ._progress import Progress
from ._sources import Source


class Plan:
    """How a model's key-value cache is stored.

    bits: effective bits per element at the context that the plan was made for, everything stored per token counted.
    predicted_kl: nats a token, or None.  model: which model it is for.  provenance: where it came from.
    units: a dict for each side of a layer, or each of its heads: pandas.DataFrame(plan.units) is a table.
    frontier: (bits, predicted KL) that every budget buys, nearly; recall: {"full", "plan"}, shares of the calibration text's facts that are
    still answered.  Both only from calibrate(), and None where the method does not have them.
    """

    def __init__(self, plan, frontier=None, recall=None):
        self._plan, self.frontier, self.recall = plan, frontier, recall
        self._description = json.loads(plan.describe())

    @staticmethod
    def load(path):
        """Read a plan file strictly.  Raises RuntimeError that names the file and what is wrong."""
        return Plan(core.Plan.load(os.fspath(path)))

    def save(self, path):
        """Write a plan file, whole or not at all."""
        self._plan.save(os.fspath(path))

    def summary(self):
        """What it is for, bits and bytes, and the bits of every layer: text for people."""
        return self._plan.summary()

    def effective_bits(self, tokens):
        """Bits per element of keys and values of a sequence of so many tokens."""
        return self._plan.effective_bits(_inputs.integer("tokens", tokens))

    def cache_bytes(self, tokens):
        """Bytes of the keys and values of one sequence of so many tokens, in the layers that the plan stores."""
        return self._plan.cache_bytes(_inputs.integer("tokens", tokens))

    @functools.cached_property
    def identity(self):
        """Names this plan among all others."""
        return self._plan.identity()

    @property
    def bits(self):
        return self._plan.effective_bits()

    @property
    def constant_bytes(self):
        """Bytes of codebooks, rotations and the like, whatever the context."""
        return self._plan.constant_bytes()

    @property
    def predicted_kl(self):
        return self._description.get("predicted_kl")

    @property
    def model(self):
        return self._description["model"]

    @property
    def provenance(self):
        return self._description["provenance"]

    @property
    def units(self):
        rows = []
        for unit in self._description["units"]:
            row = {name: unit.get(name) for name in ("layer", "side", "head", "bits", "predicted_kl", "method")}
            rows.append({**row, **unit.get("numbers", {})})
        return rows

    def __eq__(self, other):
        return self._plan == other._plan if isinstance(other, Plan) else NotImplemented

    def __repr__(self):
        kl = "" if self.predicted_kl is None else f", predicted KL {self.predicted_kl:.4f}"
        return f"Plan({self.model['architecture']}, {self.provenance['method']}, {self.bits:.4g} bits{kl})"


@_inputs.documented
def calibrate(
    model,
    tokenizer=None,
    bits=2.0,
    *,
    bytes=None,
    context=0,
    method="rotated_pq",
    units=None,
    keys=None,
    window=None,
    sinks=None,
    sliding="full",
    num_samples=0,
    sequence_length=0,
    text=None,
    seed=0,
    device="gpu",
    progress=None,
):
    """Make a plan: how every head's keys and values are stored.

    model: a live mlx_lm model, or a path to a folder.  tokenizer: as in ratequant.calibrate_layer_sensitivities; None for a folder: its own.
    bits: effective bits per element on average, everything stored per token counted; or bytes of one sequence of `context` tokens.
    context: tokens at which bits and bytes are counted; 0: the model's maximum.
    method: "rotated_pq", or "vecinfer", "turboquant", "kivi", "affine".
    units: what gets a width of its own: "head", "kv", "layer" or "uniform"; None: what suits the method.
    keys ("full", "plane"), window, sinks (tokens kept at 8 bits): of rotated_pq; None: full, 32, 4.
    sliding: "full" leaves layers with a sliding window as they are, "quantize" stores them like others.
    num_samples, sequence_length: 0: what suits the method (40 of up to 2048 tokens, or 32 of 512).
    text: read beside what the model writes itself (rotated_pq: a third of the samples), or in its place.
    seed, device, progress: as in ratequant.calibrate_layer_sensitivities.

    Returns a Plan.  Raises ValueError or TypeError that say what was expected, RuntimeError for files that cannot be read.
    """
    if bytes is not None:
        bytes = _inputs.integer("bytes", bytes, most=2**62)
    context, num_samples = _inputs.integer("context", context, 0), _inputs.integer("num_samples", num_samples, 0)
    length = _inputs.integer("sequence_length", sequence_length, 0)
    window, sinks = (
        value if value is None else _inputs.integer(name, value, 0, 65536) for name, value in (("window", window), ("sinks", sinks))
    )
    bits, seed, texts = _inputs.number("bits", bits), _inputs.seed(seed), _inputs.texts(text)
    method, sliding = _inputs.word("method", method), _inputs.word("sliding", sliding)
    units, keys = _inputs.word("units", units, optional=True), _inputs.word("keys", keys, optional=True)
    with Source(model, tokenizer, device) as source, contextlib.ExitStack() as stack, Progress(progress) as report:
        engine = source.engine
        if engine is None:
            walk = stack.enter_context(LayerWalk(model))
            engine = walk.engine_model(first_token(model, tokenizer), turns=method == "rotated_pq")
        plan, frontier, full, kept = core.calibrate(
            engine,
            source.encoder,
            texts,
            method,
            bits,
            bytes,
            context,
            units,
            keys,
            window,
            sinks,
            sliding,
            num_samples,
            length,
            seed,
            source.device,
            report,
        )
    if source.hashes is not None:
        plan.set_hashes(*source.hashes)
    return Plan(plan, frontier or None, None if full is None else {"full": full, "plan": kept})
