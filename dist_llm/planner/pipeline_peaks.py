"""The most activations of a pipeline rank for any sizes of its stages: its program is walked once, in symbols.

    bytes at a moment = sum over stages and fields of count x field      (fields of StageMemory, counts from the walk)

Beyond a few rounds of microbatches the most grows evenly, where a schedule keeps something of each until the step ends,
or not at all: two walks say how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

from dist_llm.accounting.schedules import Pipe
from dist_llm.accounting.stage_memory import StageMemory
from dist_llm.planner.messages import Program, write_programs
from dist_llm.planner.pipeline_memory import levels

_FIELDS = tuple(field.name for field in fields(StageMemory))
_sizes = attrgetter(*_FIELDS)
_ROUNDS, _MORE_ROUNDS, _GPIPE_ROUNDS = 5, 10, 40
"""Rounds, of as many microbatches as ranks, after which a schedule was in its steady state and is out again; and those
after which what is kept of each microbatch for all a step (torch before 2.15, gpipe) has outgrown what is not."""
_DIGITS = 32
"""Binary digits of a count in a moment."""


@dataclass(frozen=True)
class RankWork:
    """A rank of a pipeline, those of its stages that are looked at, and whether backwards are split."""

    pipe: Pipe
    rank: int
    stages: tuple[int, ...]
    splits: bool
    as_needed: bool


def most_bytes(work: RankWork, memories: Sequence[StageMemory]) -> int:
    """Return the most bytes of activations of these stages; equal to pipeline_memory.most_activations."""
    sizes = [size for memory in memories for size in _sizes(memory)]
    pipe = work.pipe
    if pipe.schedule == "1f1b":
        # A few more than are in flight have all that more of them have, but buffers of a whole step.
        enough = min(pipe.microbatches, pipe.ranks - work.rank + 3)
        beyond = 0 if work.as_needed else pipe.microbatches - enough
        return _most(_with(work, enough), sizes) + beyond * sum(each.input + each.output for each in memories)
    rounds = _GPIPE_ROUNDS if pipe.schedule == "gpipe" else _ROUNDS if work.as_needed else _MORE_ROUNDS
    enough = rounds * pipe.chunks * pipe.ranks + pipe.microbatches % pipe.ranks
    if pipe.microbatches <= enough + pipe.ranks:
        return _most(work, sizes)
    at, after = (_most(_with(work, enough + more), sizes) for more in (0, pipe.ranks))
    return at + (pipe.microbatches - enough) // pipe.ranks * (after - at)


def _with(work: RankWork, microbatches: int) -> RankWork:
    return replace(work, pipe=replace(work.pipe, microbatches=microbatches))


def _most(work: RankWork, sizes: Sequence[int]) -> int:
    import numpy as np

    return int((_moments(work) @ np.array(sizes, dtype=np.int64)).max())


def _program(work: RankWork) -> Program:
    """Return what the rank does, with what it is told where that matters: when receives of several stages come."""
    if work.as_needed and work.pipe.schedule not in ("1f1b", "gpipe"):
        return programs_of(work.pipe)[work.rank]
    return [*work.pipe.order(work.rank)]


@lru_cache(maxsize=256)
def programs_of(pipe: Pipe) -> list[Program]:
    """Return what each rank does and tells."""
    return write_programs(pipe)


@lru_cache(maxsize=8192)
def _moments(work: RankWork) -> Any:
    """Return the counts of the moments, a row each, none twice.

    The walk adds whole numbers in which each field of each stage has digits of its own.
    """
    import numpy as np

    width = len(_FIELDS)
    symbols: dict[int, StageMemory] = {}
    for place, stage in enumerate(work.stages):
        units = {name: 1 << _DIGITS * (place * width + index) for index, name in enumerate(_FIELDS)}
        if not work.splits:
            units |= {"waiting": 0, "weight_peak": 0}
        symbols[stage] = StageMemory(**units)
    places = width * len(symbols)
    # Half of what a count may be is added to each, for some are below 0.
    half = sum(1 << _DIGITS * place + _DIGITS - 1 for place in range(places))
    found = {*levels(work.pipe, _program(work), symbols, work.as_needed)}
    digits = b"".join((number + half).to_bytes(places * _DIGITS // 8, "little") for number in found)
    return np.frombuffer(digits, dtype="<u4").reshape(len(found), places).astype(np.int64) - (1 << _DIGITS - 1)
