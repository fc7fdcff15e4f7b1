"""The most activations of a pipeline rank for any sizes of its stages: its program is walked once, in symbols.

    bytes at a moment = sum over stages and fields of count x field      (fields of StageMemory, counts from the walk)

Beyond a few rounds of microbatches the most grows evenly, where a schedule keeps something of each until the step ends,
or not at all: two walks say how.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Counts:
    """How often each field of each stage counts; adds up as bytes do."""

    __slots__ = ("counts",)

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts

    def __add__(self, other: Counts | int) -> Counts:
        if isinstance(other, int):
            return self
        return Counts(tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    __radd__ = __add__

    def __neg__(self) -> Counts:
        return Counts(tuple(-a for a in self.counts))

    def __sub__(self, other: Counts | int) -> Counts:
        return self if isinstance(other, int) else self + -other

    def __rsub__(self, other: int) -> Counts:
        return -self

    def __mul__(self, times: int) -> Counts:
        return Counts(tuple(a * times for a in self.counts))

    __rmul__ = __mul__


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
    if work.as_needed and pipe.schedule == "1f1b":
        # Two rounds have all that more of them have.
        return _most(_with(work, min(pipe.microbatches, 2 * pipe.ranks + 2)), sizes)
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


@lru_cache(maxsize=256)
def programs_of(pipe: Pipe) -> list[Program]:
    """Return what each rank does and tells."""
    return write_programs(pipe)


@lru_cache(maxsize=8192)
def _moments(work: RankWork) -> Any:
    """Return the counts of the moments, a row each, none twice."""
    import numpy as np

    width = len(_FIELDS) * len(work.stages)
    symbols: dict[int, Any] = {}
    for place, stage in enumerate(work.stages):
        units: dict[str, Any] = {
            name: Counts(tuple(int(at == place * len(_FIELDS) + index) for at in range(width)))
            for index, name in enumerate(_FIELDS)
        }
        if not work.splits:
            units = {name: 0 if name in ("waiting", "weight_peak") else unit for name, unit in units.items()}
        symbols[stage] = StageMemory(**units)
    program = programs_of(work.pipe)[work.rank]
    walk: Iterator[Any] = levels(work.pipe, program, symbols, work.as_needed)
    found = {level.counts if isinstance(level, Counts) else (0,) * width for level in walk}
    return np.array(sorted(found), dtype=np.int64)
