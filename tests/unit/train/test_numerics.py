"""The guard ends a run after too many skipped steps in a row, and not before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_llm.errors import ExitCode, NumericsError
from dist_llm.train.numerics import NumericsGuard
from dist_llm.types import StepRecord

GOOD = StepRecord(1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, None, 1.0)
SKIPPED = replace(GOOD, loss=float("nan"), skipped=True)


def test_only_skips_in_a_row_count() -> None:
    events: list[tuple[object, ...]] = []
    guard = NumericsGuard(3, lambda *facts: events.append(facts))
    for record in (SKIPPED, SKIPPED, GOOD, SKIPPED, SKIPPED):
        guard.after_step(record)
    with pytest.raises(NumericsError, match="3 steps in a row") as caught:
        guard.after_step(SKIPPED)
    assert caught.value.exit_code == ExitCode.NUMERICS
    assert caught.value.shared
    assert [kind for kind, *_ in events] == ["skip"] * 5


def test_it_goes_on_from_the_count_of_the_process_before() -> None:
    guard = NumericsGuard(3, lambda *facts: None, 2)
    with pytest.raises(NumericsError, match="3 steps in a row"):
        guard.after_step(SKIPPED)
