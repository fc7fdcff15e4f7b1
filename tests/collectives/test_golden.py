"""What a step issues is what is written down, collective for collective: a surplus all-gather fails."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.ops import linear
from dist_llm.runtime.pool import WorkerPool
from tests.collectives.layouts import (
    BY_HAND,
    LAYOUTS,
    Totals,
    added,
    by_formula,
    config_of,
    measured,
    merged,
    name_of,
    num_ranks,
    read_golden,
)
from tests.parallel.ledger import Ledger
from tests.parallel.tiny import build, random_batch, tiny_config

QUICK = [layout for layout in LAYOUTS if layout[0] <= 4]
LONG = [layout for layout in LAYOUTS if layout[0] > 4]


def _issued(pool: WorkerPool, config: RunConfig, ranks: int) -> tuple[Totals, dict[str, str]]:
    reports = pool.run(measured, config, world=ranks)
    return added(totals for totals, _ in reports), reports[0][1]


def _id(layout: tuple[int, dict[str, object], dict[str, object]]) -> str:
    return name_of(*layout[1:])


def test_the_formulas_give_what_is_written_down() -> None:
    golden = read_golden()
    assert set(golden) == {_id(layout) for layout in LAYOUTS}
    for ranks, parallel, model in LAYOUTS:
        assert num_ranks(parallel) == ranks
        assert by_formula(config_of(parallel, model), ranks) == golden[name_of(parallel, model)], parallel


def test_numbers_counted_by_hand() -> None:
    golden = read_golden()
    for name, totals in BY_HAND.items():
        for key, (count, _) in totals.items():
            assert golden[name][key][0] == count, (name, key)


@pytest.mark.parametrize(
    "layout", [*QUICK, *(pytest.param(layout, marks=pytest.mark.slow) for layout in LONG)], ids=_id
)
def test_a_step_issues_what_is_written_down(pool: WorkerPool, layout: Any) -> None:
    ranks, parallel, model = layout
    issued, canonical = _issued(pool, config_of(parallel, model), ranks)
    assert issued == merged(read_golden()[name_of(parallel, model)], canonical)


def one_more(config: RunConfig) -> tuple[Totals, dict[str, str]]:
    """Issue one gather too many."""
    from dist_llm.parallel import collectives

    kept = collectives._reduce_scatter_sequence

    def twice(x: Any, axis: Any) -> Any:
        out = kept(x, axis)
        collectives._all_gather_sequence(out, axis)
        return out

    with patch.object(collectives, "_reduce_scatter_sequence", twice):
        return measured(config)


def test_a_surplus_gather_is_found(pool: WorkerPool) -> None:
    layout = next(layout for layout in LAYOUTS if layout[1].get("sequence"))
    reports = pool.run(one_more, config_of(*layout[1:]), world=layout[0])
    issued = added(totals for totals, _ in reports)
    golden = merged(read_golden()[_id(layout)], reports[0][1])
    assert {key for key in golden if issued[key] != golden[key]} == {
        key for key in golden if key.endswith(" all_gather")
    }


def _sharding(pool: WorkerPool, parallel: dict[str, object], microbatches: int, ranks: int) -> tuple[int, int]:
    """Return gathers and reduce-scatters over the shard axis of rank 0 in a step of so many microbatches."""
    data = {"global_batch": 2 * microbatches, "microbatch": 1}
    totals, canonical = pool.run(measured, tiny_config(parallel, {}, data), world=ranks)[0]
    axis = canonical["shard"]
    gathers, reduces = (totals.get(f"{axis} {kind}", [0, 0])[0] for kind in ("all_gather", "reduce_scatter"))
    return gathers, reduces


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_zero_1_gathers_and_reduces_each_unit_once(pool: WorkerPool, microbatches: int) -> None:
    """4 blocks, and the root with the tied embedding and head."""
    assert _sharding(pool, {"zero": 1}, microbatches, 2) == (5, 5)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_zero_1_does_so_in_a_pipeline(pool: WorkerPool, microbatches: int) -> None:
    """2 blocks and the embedding."""
    assert _sharding(pool, {"pipeline": 2, "zero": 1}, microbatches, 4) == (3, 3)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_zero_2_and_3_do_so_each_microbatch_of_a_pipeline(pool: WorkerPool, microbatches: int) -> None:
    """ZeRO-3 gathers before each forward and again before each backward: between them the parameters were let go."""
    assert _sharding(pool, {"pipeline": 2, "zero": 2}, microbatches, 4) == (3, 3 * microbatches)
    assert _sharding(pool, {"pipeline": 2, "zero": 3}, microbatches, 4) == (6 * microbatches, 3 * microbatches)


def accumulations(config: RunConfig) -> tuple[set[int], Totals]:
    """Return how often each linear's weight was added to in the second of two steps, and what the step issued."""
    engine = build(config)
    engine.train_step(random_batch(config, engine.data_slice, 0))
    counts: dict[int, int] = {}
    kept = linear.accumulate

    def counted(parameter: Any, gradient: Any) -> None:
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        kept(parameter, gradient)

    with patch.object(linear, "accumulate", counted), Ledger(engine._mesh) as ledger:
        engine.train_step(random_batch(config, engine.data_slice, 1))
    issued = {f"{axis} {kind}": [count, ledger.bytes[axis, kind]] for (axis, kind), count in ledger.counts.items()}
    return set(counts.values()), issued


def test_a_split_backward_does_everything_once(pool: WorkerPool) -> None:
    """The same collectives as 1f1b, where nothing is split, and each weight's gradient once a microbatch."""
    parallel = {"pipeline": 2, "tensor": 2, "sequence": True, "data": 2, "zero": 2}
    data = {"global_batch": 4, "microbatch": 1}
    whole = pool.run(measured, tiny_config({**parallel, "schedule": "1f1b"}, {}, data), world=8)
    split = pool.run(accumulations, tiny_config({**parallel, "schedule": "zero_bubble"}, {}, data), world=8)
    for (before, _), (added_to, after) in zip(whole, split, strict=True):
        assert added_to == {2}
        assert after == before
