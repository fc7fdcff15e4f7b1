"""The training loop: a step, its record, and whoever wants to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_llm.engine.base import Engine
from dist_llm.types import Batch, StepRecord, StepResult

Hook = Callable[[StepRecord], None]
"""Receives the frozen record of a finished step and returns nothing."""


class Source(Protocol):
    """Where batches come from: a pure function of the step."""

    def batch(self, step: int) -> Batch:
        """Return this process's share of the global batch of a step."""
        ...


class Clock(Protocol):
    """Turns a step's result and the time it took into its record."""

    def start(self) -> None:
        """Mark the beginning of a step."""
        ...

    def stop(self, step: int, result: StepResult) -> StepRecord:
        """Return the record of the step that `start` began."""
        ...


@dataclass(frozen=True)
class Span:
    """Steps `start` to `stop` of a run; `start` of them are done."""

    start: int
    stop: int


def loop(
    engine: Engine,
    source: Source,
    span: Span,
    meter: Clock,
    hooks: Sequence[Hook],
    interrupted: Callable[[], bool],
) -> int:
    """Train over the span and return the number of steps that are done; fewer than `span.stop` when interrupted."""
    for step in range(span.start, span.stop):
        meter.start()
        result = engine.train_step(source.batch(step))
        record = meter.stop(step + 1, result)
        for hook in hooks:
            hook(record)
        if interrupted():
            return step + 1
    return span.stop
