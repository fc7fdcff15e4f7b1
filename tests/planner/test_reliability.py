"""Interruptions and checkpoint intervals: Young 1974, Daly 2006, and what Llama 3's training met."""

from __future__ import annotations

import math
import random

import pytest

from dist_llm.planner.line_search import lowest
from dist_llm.planner.reliability import (
    LLAMA3_DEVICE_MTBF_HOURS,
    daly_interval_seconds,
    expected_reliability,
    wall_seconds,
    young_interval_seconds,
)


def test_llama3_405b() -> None:
    """Grattafiori et al. 2024, section 3.3.4: 419 unexpected interruptions in 54 days, one each 3 hours."""
    found = expected_reliability(54 * 86400, 16384, save_seconds=1, restart_seconds=0)
    assert found.job_mtbf_hours == pytest.approx(3.1, abs=0.05)
    assert found.interruptions * 54 * 86400 / found.wall_seconds == pytest.approx(419)


@pytest.mark.parametrize(("save", "mtbf"), [(1.0, 3600.0), (60.0, 10000.0), (300.0, 3000.0)])
def test_daly_is_near_the_true_best_and_nearer_than_young(save: float, mtbf: float) -> None:
    def wall(interval: float) -> float:
        return wall_seconds(1e6, interval, save, 0.0, mtbf)

    best = lowest(wall, save / 10, 20 * young_interval_seconds(save, mtbf))
    daly, young = daly_interval_seconds(save, mtbf), young_interval_seconds(save, mtbf)
    assert daly == pytest.approx(best, rel=0.01)
    assert abs(daly - best) < abs(young - best)
    assert wall(best) <= wall(daly) <= wall(young)


def test_first_order_by_hand() -> None:
    assert young_interval_seconds(50, 10000) == 1000
    assert daly_interval_seconds(50, 20) == 20


def test_wall_clock_is_what_random_failures_make_it() -> None:
    """Simulated: segments of work and save, repeated from their start after each failure and a restart."""
    random.seed(0)
    work, interval, save, restart, mtbf = 4000.0, 100.0, 10.0, 30.0, 400.0
    total, trials = 0.0, 300
    for _ in range(trials):
        for _ in range(round(work / interval)):
            total += _segment(interval + save, restart, mtbf)
    expected = wall_seconds(work, interval, save, restart, mtbf)
    assert total / trials == pytest.approx(expected, rel=0.02)


def _segment(seconds: float, restart: float, mtbf: float) -> float:
    """Return the time that one segment takes; a failure during the restart begins it again."""
    spent, needed = 0.0, seconds
    while True:
        failure = random.expovariate(1 / mtbf)
        if failure >= needed:
            return spent + needed
        spent, needed = spent + failure, restart + seconds


def test_parts_add_up() -> None:
    found = expected_reliability(1e6, 1024, save_seconds=20, restart_seconds=300)
    assert 1e6 + found.saving_seconds + found.lost_seconds == pytest.approx(found.wall_seconds)
    assert found.goodput == pytest.approx(1e6 / found.wall_seconds)
    assert 0.9 < found.goodput < 1
    assert found.job_mtbf_hours == pytest.approx(LLAMA3_DEVICE_MTBF_HOURS / 1024)
    safe = expected_reliability(1e6, 1, save_seconds=0, restart_seconds=0)
    assert safe.goodput == pytest.approx(1, abs=1e-3)
    assert math.isfinite(safe.checkpoint_interval_seconds)
