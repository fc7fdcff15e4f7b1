"""A step's record: its time, its rate, its share of the peak."""

from __future__ import annotations

import pytest

from dist_llm.telemetry.meters import Meter
from dist_llm.types import StepResult

RESULT = StepResult(loss=2.5, grad_norm=0.75, lr=3e-4, tokens=1000)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_mfu() -> None:
    clock = Clock()
    meter = Meter(flops_per_token=6e9, peak_flops=1e14, memory_gib=lambda: 1.5, clock=clock)
    clock.now += 40  # Making the model is not part of the first step.
    meter.start()
    clock.now += 0.25
    record = meter.stop(7, RESULT)
    assert (record.step, record.tokens, record.loss, record.grad_norm, record.lr) == (7, 1000, 2.5, 0.75, 3e-4)
    assert record.step_seconds == pytest.approx(0.25)
    assert record.tokens_per_second == pytest.approx(4000)
    assert record.mfu == pytest.approx(6e9 * 4000 / 1e14)
    assert record.memory_gib == 1.5
    assert not record.skipped


def test_tokens_count_on_over_steps_and_resumes() -> None:
    clock = Clock()
    meter = Meter(6e9, None, lambda: 0.0, tokens=5000, clock=clock)
    for step, total in ((6, 6000), (7, 7000)):
        meter.start()
        clock.now += 0.5
        record = meter.stop(step, RESULT)
        assert record.tokens == total
        assert record.tokens_per_second == pytest.approx(2000)


def test_without_a_peak_there_is_no_mfu() -> None:
    meter = Meter(6e9, None, lambda: 0.0)
    meter.start()
    assert meter.stop(1, RESULT).mfu is None


def test_a_clock_that_stands_still_divides_by_nothing() -> None:
    meter = Meter(6e9, 1e14, lambda: 0.0, clock=Clock())
    meter.start()
    assert meter.stop(1, RESULT).tokens_per_second > 0
