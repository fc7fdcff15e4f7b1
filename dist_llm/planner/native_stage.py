"""What a microbatch costs a stage of the native engine, reckoned part by part: equal to what a dry run measures.

    forward   at part i: what the parts before it hold + the most while it runs
    backward  at part i: what it and the parts before it hold + the gradient of its output + the most while it runs

Every part is run once on a tape (native_model.py) and remembered by all that it depends on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.accounting.memory import FORMAT_BYTES
from dist_llm.accounting.params import padded_vocab
from dist_llm.accounting.stage_memory import StageMemory
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.planner.native_model import Parts, Setting, Share
from dist_llm.planner.native_ops import Formats
from dist_llm.planner.stage_kind import Hashed, StageKind, kind_of
from dist_llm.planner.tape import Buffer, Tape, Value, leaf


@dataclass(frozen=True)
class PartMemory:
    """Bytes of one part: what it holds until its backward, its output among them; the most that it adds while it runs.

    first_backward, backward: the most above what the part holds, the gradient of its output in the place of that.
    waiting: what the second half of a backward is made of; weights: the most above that while it runs. stays: what of
    it stays until the stage's backward is done.
    """

    held: int
    output: int
    forward: int
    first_backward: int
    backward: int
    waiting: int
    weights: int
    stays: int


def setting_of(config: RunConfig) -> Setting:
    """Return what the bytes of a config's parts depend on, everything else set alike."""
    model, parallel, data = config.model, config.parallel, config.data
    share = data.seq_len // parallel.context
    part = share // parallel.tensor if parallel.sequence else share
    formats = Formats(FORMAT_BYTES[config.precision.compute], FORMAT_BYTES[config.precision.master])
    shares = Share(data.microbatch, share, part, data.document_mask)
    return Setting(model, parallel, formats, shares, _writes_over_logits(config))


def _writes_over_logits(config: RunConfig) -> bool:
    """Whether the native cross entropy computes the loss (ops/registry.py), where it is installed."""
    formats = {"auto": ("fp32",), "native": ("fp32", "bf16", "fp16")}.get(config.kernels.cross_entropy, ())
    return config.cluster.device == "cpu" and config.precision.compute in formats


class PartKey:
    """A setting, compared by what a part sees of it."""

    __slots__ = ("_hash", "_seen", "setting")

    def __init__(self, setting: Setting, model: Hashed[ModelConfig] | None = None) -> None:
        p = setting.parallel
        layout = (p.tensor, p.sequence, p.context, p.head_ranks, p.expert, p.splits_backward, p.pipeline > 1)
        again = (p.recompute, p.recompute_operators)
        rest = (setting.formats, setting.share, setting.loss_in_place)
        self._seen = (model or Hashed(setting.model), layout, again, *rest)
        self._hash, self.setting = hash(self._seen), setting

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartKey) and self._seen == other._seen


def stage_memory(config: RunConfig, stage: StagePlan) -> StageMemory:
    """Return what a microbatch costs a stage."""
    return kind_memory(PartKey(setting_of(config)), kind_of(config, stage))


@lru_cache(maxsize=16384)
def kind_memory(key: PartKey, kind: StageKind) -> StageMemory:
    """Return what a microbatch costs a stage of a kind: dense layers come first, and of each those that recompute."""
    setting, layers = key.setting, kind.layers
    runs: list[tuple[str, bool, bool, int]] = [
        ("embed", False, False, int(kind.first)),
        ("block", False, True, layers.dense_again),
        ("block", False, False, layers.dense - layers.dense_again),
        ("block", True, True, layers.experts_again),
        ("block", True, False, layers.experts - layers.experts_again),
        ("head", setting.parallel.pipeline > 1, False, int(kind.last)),
    ]
    tied = setting.model.tie_embeddings and kind.first and kind.last
    parts: list[PartMemory] = []
    for name, flag, again, times in runs:
        if times:
            parts += [_part(key, name, flag, again, tied)] * times
    crossing = setting.share.batch * setting.share.part * setting.model.hidden_size * setting.formats.compute
    return _joined(parts, crossing * (not kind.first), crossing * (not kind.last), _table(setting) * tied)


def loss_bytes(config: RunConfig) -> int:
    """Return the most bytes that a microbatch's logits and loss hold at once."""
    setting = setting_of(config)
    ranks, formats = config.parallel.tensor, setting.formats
    width = formats.compute + formats.wide * (not setting.loss_in_place)
    logits = setting.share.tokens * (padded_vocab(config.model.vocab_size, ranks) // ranks)
    return logits * width


@lru_cache(maxsize=4096)
def _part(key: PartKey, kind: str, flag: bool, again: bool, tied: bool) -> PartMemory:
    """Return the memory of a part; flag: experts of a block, or whether a head's logits are kept."""
    # The gradient of a tied table is one sum: what the head has made waits for the embedding's.
    alone = tied and kind == "head"
    first, later = (_run(key.setting, kind, flag, again, accumulates) for accumulates in (alone, True))
    return PartMemory(
        later.held,
        later.output,
        later.forward,
        first.backward,
        later.backward,
        first.waiting,
        first.weights,
        first.stays,
    )


def _run(setting: Setting, kind: str, flag: bool, again: bool, accumulates: bool) -> PartMemory:
    """Run one part forward and back."""
    tape = Tape(accumulates, setting.formats.narrow, setting.parallel.splits_backward)
    parts, meter = Parts(setting, tape), tape.meter
    entering = leaf()
    source = Value(None, parts.hidden_numel(), setting.formats.compute, entering)
    kept: Value | None = None
    if kind == "embed":
        del source
        out = parts.embed()
    elif kind == "block":
        out = parts.block(source, flag, again)
        del source
    else:
        out, kept = parts.head(source, flag)
        del source
    held, forward, output = meter.level, meter.most, out.size
    stays = 0 if kept is None else kept.size
    del out
    gradient: list[Buffer | None] = [tape.new(output)]
    held_inside = meter.begin() - output
    found = tape.back(tape.nodes, gradient, [entering])
    backward = meter.most - held_inside - output
    del found, kept
    tape.unit.clear()
    waiting = meter.level
    meter.begin()
    tape.finish()
    return PartMemory(held, output, forward, backward, backward, waiting, meter.most - waiting, stays)


def _table(setting: Setting) -> int:
    """Return the bytes of a gradient of the token table."""
    ranks = setting.parallel.tensor
    return padded_vocab(setting.model.vocab_size, ranks) // ranks * setting.model.hidden_size * setting.formats.compute


def _joined(parts: list[PartMemory], entering: int, leaving: int, table: int) -> StageMemory:
    """Put parts one after another; what leaves the stage, or logits that a pipeline keeps, stays all the backward.

    table: bytes of the gradient that the head of a tied pair makes and the embedding adds to.
    """
    level = forward = 0
    for part in parts:
        forward = max(forward, level + part.forward)
        level += part.held
    held, waiting = level, 0
    stays = leaving + parts[-1].stays
    level -= stays
    first = later = 0
    for place, part in enumerate(reversed(parts)):
        # The gradient of a part's output has taken its place, but that of what leaves comes from outside.
        before = stays + level + waiting + (table if place else 0)
        first, later = max(first, before + part.first_backward), max(later, before + part.backward)
        level -= part.held - (leaving + part.stays if place == 0 else 0)
        waiting += part.waiting
    weights, left = 0, waiting
    for part in reversed(parts):
        weights = max(weights, left + part.weights)
        left -= part.waiting
    return StageMemory(
        forward_peak=forward,
        held=held,
        first_backward_peak=max(0, first - held),
        backward_peak=max(0, later - held),
        waiting=waiting,
        weight_peak=max(0, weights - waiting),
        input=entering,
        output=leaving,
    )
