"""Seconds of a pipeline's step from the times of its stages and of the messages between them.

    gpipe, 1f1b    sum of all F + B + 2 (n - 1) c + (m - 1) P   P: mean of the dearest run of stages, messages too
    meeting        the same, P: the most of F + B + 2 c for each neighbour      DeepSpeed's pipeline, as 1f1b
    interleaved    m R + (n - 1) (F + B) / v + 2 (n - 1) c        R: the dearest rank, all of its chunks
    split ones     m R + i (n - 1) (F + B) + 2 (n - 1) c          i: 1/3, or 2/3 for dualpipev, of halves that are equal

Each stage has one microbatch more in flight than the next, so d + 1 of them go round a run of d + 1 stages in its time
plus 2 d messages. Where neighbours meet before each forward and backward, a gradient and an activation go one after
the other and both wait. Narayanan et al. 2021; Qi et al. 2023. Equal to planner/schedule_trace where c is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.accounting.schedules import stage_rank

_SPLIT_IDLE = {"zero_bubble": 1 / 3, "zbv": 1 / 3, "dualpipev": 2 / 3}
"""What each further rank adds to the time that ranks idle in a step, in forwards and backwards of one stage."""


@dataclass(frozen=True)
class PipelineSeconds:
    """A step of a pipeline: its seconds, of which the dearest rank works, waits for messages, and idles."""

    seconds: float
    busy: float
    messages: float

    @property
    def bubble(self) -> float:
        """What is neither work of the dearest rank nor messages."""
        return max(0.0, self.seconds - self.busy - self.messages)


@lru_cache(maxsize=2**13)
def pipeline_seconds(
    schedule: str, ranks: int, microbatches: int, works: tuple[float, ...], hop: float, meet: bool = False
) -> PipelineSeconds:
    """Return the seconds of a step; works: F + B of each stage in order, hop: of one message between ranks.

    meet: whether neighbours under 1f1b wait for each other's messages, one after the other, as DeepSpeed's do.
    """
    if ranks == 1:
        busy = microbatches * sum(works)
        return PipelineSeconds(busy, busy, 0.0)
    chunks = len(works) // ranks
    loads = [0.0] * ranks
    for index, work in enumerate(works):
        loads[stage_rank(index, ranks, schedule)] += work
    busy = microbatches * max(loads)
    ends = 2 * (ranks - 1) * hop
    if schedule in ("gpipe", "1f1b"):
        still = sum(works) + (microbatches - 1) * _period(works, 0.0)
        held = hop if schedule == "1f1b" else 0.0
        period = _meeting_period(works, held) if meet else _period(works, held)
        steady = (microbatches - 1) * (period - _period(works, 0.0))
        return PipelineSeconds(still + steady + ends, busy, steady + ends)
    if schedule == "interleaved":
        bubble = (ranks - 1) * (sum(works) / ranks) / chunks
        return PipelineSeconds(busy + bubble + ends, busy, ends)
    idle = _SPLIT_IDLE[schedule] * (ranks - 1) * sum(works) / len(works)
    return PipelineSeconds(busy + idle + ends, busy, ends)


def _period(works: tuple[float, ...], hop: float) -> float:
    """Return the time from one microbatch to the next in a 1f1b pipeline that is full."""
    if not hop:
        return max(works)
    longest = 0.0
    for first in range(len(works)):
        total = 0.0
        for last in range(first, len(works)):
            total += works[last]
            pairs = last - first
            longest = max(longest, (total + 2 * pairs * hop) / (pairs + 1))
    return longest


def _meeting_period(works: tuple[float, ...], hop: float) -> float:
    """Return the time from one microbatch to the next where each stage meets each neighbour once, for two messages."""
    last = len(works) - 1
    return max(work + 2 * hop * ((index > 0) + (index < last)) for index, work in enumerate(works))
