"""The solver's verdict is what happens: a layout is legal where it can be built and stepped, and illegal where not."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from random import Random
from warnings import catch_warnings, simplefilter

import pytest

from dist_llm.config.checks import check
from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.dry_run import dry_run
from tests.parallel.tiny import curve
from tests.planner.triples import draw

PROCESSES = 2
"""They check no shapes at each call, as the process of the tests does."""


def what_happens(config: RunConfig, ranks: int) -> str | None:
    """Build every stage on a fake group, step it on tensors without values, prove its schedule; None if all goes."""
    try:
        dry_run(config, ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def disagreements(seeds: list[int]) -> list[str]:
    """Return the triples of which the verdict is wrong."""
    wrong = []
    for seed in seeds:
        config, ranks = draw(Random(seed))
        broken = [str(violation) for violation in check(config, ranks)]
        with catch_warnings():
            simplefilter("error")
            happened = what_happens(config, ranks)
        if bool(broken) != (happened is not None):
            asked = config.parallel.model_dump(exclude_defaults=True)
            wrong.append(f"seed {seed}, {ranks} ranks, {asked}: the rules say {broken}, building says {happened}")
    return wrong


def _all_agree(seeds: range) -> None:
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as processes:
        shares = [list(seeds[start::PROCESSES]) for start in range(PROCESSES)]
        wrong = [line for lines in processes.map(disagreements, shares) for line in lines]
    assert not wrong, "\n".join(wrong)


def test_the_verdict_is_what_happens() -> None:
    _all_agree(range(200))


@pytest.mark.slow
def test_the_verdict_is_what_happens_to_many() -> None:
    _all_agree(range(200, 2000))


def test_what_is_drawn_is_half_legal_and_breaks_every_rule() -> None:
    drawn = [draw(Random(seed)) for seed in range(400)]
    broken = [violation for config, ranks in drawn for violation in check(config, ranks)]
    assert 160 <= len(drawn) - len(broken) <= 240
    assert {violation.key for violation in broken} >= {
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.virtual_pipeline",
        "parallel.context",
        "parallel.context_heads",
        "parallel.expert",
        "parallel.replicate",
        "data.global_batch",
        "data.seq_len",
        "model.attention_dropout",
    }


@pytest.mark.slow
def test_legal_layouts_train(pool: WorkerPool) -> None:
    """Fifty of at most 8 ranks take two steps, and all ranks agree on what came of them."""
    drawn = (draw(Random(seed)) for seed in range(2000, 3000))
    legal = [(config, ranks) for config, ranks in drawn if ranks <= 8 and not check(config, ranks)][:50]
    assert len(legal) == 50
    for config, ranks in legal:
        curves = pool.run(curve, config, 2, world=ranks)
        assert all(other == curves[0] for other in curves)
