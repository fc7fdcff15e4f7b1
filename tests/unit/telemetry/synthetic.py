"""A made-up run for the tests of telemetry."""

from __future__ import annotations

import math

from dist_llm.types import StepRecord


def step_record(step: int, loss: float | None = None, mfu: float | None = 0.4) -> StepRecord:
    """Return a plausible record of a step whose loss falls from 8 to 3."""
    return StepRecord(
        step=step,
        tokens=8192 * step,
        loss=3 + 5 * math.exp(-step / 40) if loss is None else loss,
        grad_norm=0.5 + 1 / step,
        lr=3e-4,
        step_seconds=0.5,
        tokens_per_second=16384.0,
        mfu=mfu,
        memory_gib=1.25,
    )
