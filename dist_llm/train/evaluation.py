"""Validation between steps: the mean loss of a fixed set of batches, the same on every rank and layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dist_llm.engine.base import Engine
from dist_llm.train.loop import Source
from dist_llm.types import StepRecord


@dataclass(frozen=True)
class Evaluation:
    """Evaluates the first `num_batches` validation batches every `interval` steps."""

    engine: Engine
    source: Source
    interval: int
    num_batches: int
    report: Callable[[StepRecord, float, int], None]

    def after_step(self, record: StepRecord) -> None:
        """Evaluate when the interval says so (a hook of the loop). Every rank runs the same number of batches."""
        if record.step % self.interval:
            return
        sums = [self.engine.eval_step(self.source.batch(index)) for index in range(self.num_batches)]
        tokens = sum(each.tokens for each in sums)
        self.report(record, sum(each.loss for each in sums) / max(1, tokens), tokens)
