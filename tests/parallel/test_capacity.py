"""Under a capacity factor a step says which part of the rows experts dropped, counted once however it is split."""

from __future__ import annotations

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.tiny import MOE, build, random_batch, tiny_config

NAME = "router_dropped_fraction"


def figures(config: RunConfig) -> dict[str, float]:
    """Return the figures of one step."""
    engine = build(config)
    return dict(engine.train_step(random_batch(config, engine.data_slice, 0)).figures)


def tight(factor: float | None, parallel: dict[str, object] | None = None) -> RunConfig:
    """Return a run whose experts take `factor` times the mean."""
    moe = {**MOE["moe"], "capacity_factor": factor}  # type: ignore[dict-item]
    return tiny_config(parallel, {"moe": moe}, {"microbatch": 2}, precision={"name": "fp64"})


def test_the_fraction_is_what_the_capacity_leaves_no_room_for(pool: WorkerPool) -> None:
    def dropped(factor: float) -> float:
        fraction: float = pool.run(figures, tight(factor), world=1)[0][NAME]
        return fraction

    assert dropped(4.0) == 0.0
    assert 0.5 <= dropped(0.5) < 1.0
    assert 0.0 < dropped(1.0) < dropped(0.5)
    assert NAME not in pool.run(figures, tight(None), world=1)[0]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2}), (1, {"recompute": "full"}), (2, {"data": 2})],
    ids=str,
)
def test_it_is_counted_once(pool: WorkerPool, ranks: int, parallel: dict[str, object]) -> None:
    """These layouts give the experts the same rows at a time, so they drop the same."""
    one = pool.run(figures, tight(0.75), world=1)[0]
    for ours in pool.run(figures, tight(0.75, parallel), world=ranks):
        assert ours == pytest.approx(one)
