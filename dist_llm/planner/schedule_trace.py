"""A pipeline schedule in time: when each rank does what, how long it idles, and what it holds.

    start(action) = max(end of the rank's last action, end of what the action needs)

Communication takes no time. Idle share = 1 - work / (ranks x time of the step): (n - 1) / (m + n - 1) for gpipe and
1f1b, (n - 1) / (v m + n - 1) for interleaved (Narayanan et al. 2021). A microbatch is in flight in a stage from its
forward to the end of its backward, weights included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_llm.accounting.schedules import Action, Pipe, Work

EVEN: Mapping[Work, float] = {Work.FORWARD: 1.0, Work.INPUT: 1.0, Work.WEIGHT: 1.0, Work.BACKWARD: 2.0}
"""Times of a stage whose forward and two halves of a backward take equally long."""


@dataclass(frozen=True)
class Span:
    """An action of a rank and when it runs."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Trace:
    """A step of a pipeline; spans are by rank and start."""

    pipe: Pipe
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """Time of the step, in the unit of the given times."""
        return max(span.end for span in self.spans)

    @property
    def idle_share(self) -> float:
        """Part of all ranks' time in which they do nothing: the bubble."""
        work = sum(span.end - span.start for span in self.spans)
        return 1 - work / (self.pipe.ranks * self.seconds)

    def most_in_flight(self, rank: int) -> int:
        """Return the largest number of microbatches in flight on a rank, those of its stages added up."""
        held, most = 0, 0
        for span in self.spans:
            if span.rank == rank:
                held += (span.action.work is Work.FORWARD) - (span.action.work in (Work.BACKWARD, Work.WEIGHT))
                most = max(most, held)
        return most


def trace_schedule(pipe: Pipe, seconds: Mapping[Work, float] = EVEN) -> Trace:
    """Return when each action runs. ValueError when the order cannot be carried out."""
    last = pipe.ranks * pipe.chunks - 1
    orders = [pipe.order(rank)[::-1] for rank in range(pipe.ranks)]
    pairs = [pipe.pairs(rank) for rank in range(pipe.ranks)]
    ends: dict[Action, float] = {}
    clocks = [0.0] * pipe.ranks
    spans: list[Span] = []
    while any(orders):
        before = len(spans)
        for rank, order in enumerate(orders):
            while order:
                together = order[-1:] if order[-1] not in pairs[rank] else order[:-3:-1]
                ready = [_ready(action, last, ends) for action in together]
                known = [time for time in ready if time is not None]
                if len(known) < len(ready):
                    break
                clocks[rank] = max(clocks[rank], *known)
                for action in together:
                    order.pop()
                    start, clocks[rank] = clocks[rank], clocks[rank] + seconds[action.work]
                    spans.append(Span(rank, action, start, clocks[rank]))
                ends.update(dict.fromkeys(together, clocks[rank]))
        if len(spans) == before:
            raise ValueError(f"ranks wait for ever: {[order[-1] for order in orders if order]}")
    return Trace(pipe, tuple(sorted(spans, key=lambda span: (span.rank, span.start))))


def _ready(action: Action, last: int, ends: Mapping[Action, float]) -> float | None:
    """Return when all that an action needs is done; None while something is not."""
    stage, microbatch = action.stage, action.microbatch

    def end(*kinds: Work, at: int) -> float | None:
        return next((ends[each] for kind in kinds if (each := Action(kind, at, microbatch)) in ends), None)

    needed: list[float | None] = []
    if action.work is Work.FORWARD:
        needed = [end(Work.FORWARD, at=stage - 1)] if stage else []
    elif action.work is Work.WEIGHT:
        needed = [end(Work.INPUT, at=stage)]
    else:
        needed = [end(Work.FORWARD, at=stage)]
        needed += [] if stage == last else [end(Work.BACKWARD, Work.INPUT, at=stage + 1)]
    found = [time for time in needed if time is not None]
    return max(found, default=0.0) if len(found) == len(needed) else None
