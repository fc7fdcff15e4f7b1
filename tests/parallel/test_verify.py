"""`verify layout` and `verify resume`: equal where it is, red where a collective is broken or a state is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from dist_llm.runtime.seed import set_determinism
from dist_llm.train import verify
from dist_llm.train import verify_resume as resume
from dist_llm.train.verify import Trace, train_case, verify_layout
from dist_llm.train.verify_resume import Leg, Outcome, run_leg, verify_resume
from tests.parallel.tiny import tiny_config

TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * 7919 % 1000} lazy dogs\n" for n in range(3000))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny run on a text corpus; two layers a pipeline stage, so that interleaving is legal."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    data = {"path": str(folder / "corpus.txt"), "cache_dir": str(folder / "cache"), "microbatch": 2}
    run = {"run": {"steps": 40, "seed": 1}, "schedule": {"name": "cosine", "warmup_steps": 20}}
    return tiny_config({}, {"vocab_size": 300}, data, launcher={"nproc": 1}, **run)


@pytest.fixture
def shared(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `verify` use the ranks that are there, where it would start its own, and give them back as they were."""
    for module in (verify, resume):
        monkeypatch.setattr(module, "WorkerPool", lambda size, timeout_seconds: nullcontext(pool))
    yield
    pool.run(set_determinism, 0, False, world=pool.size)


def broken_case(config: RunConfig, prefix: Path, eos_id: int, steps: int) -> Trace:
    """Train with tensor parallelism's all-reduce dropped."""
    import dist_llm.parallel.collectives as collectives

    kept = collectives.all_reduce_sum
    collectives.all_reduce_sum = lambda x, axis: x.clone()
    try:
        return train_case(config, prefix, eos_id, steps)
    finally:
        collectives.all_reduce_sum = kept


@pytest.mark.usefixtures("shared")
def test_layouts_are_equal_and_all_legal(config: RunConfig) -> None:
    facts = verify_layout(config, fp64=True, steps=4)
    assert facts["ok"] is True, facts
    assert facts["not_legal"] == {}
    rows = facts["layouts"]
    assert isinstance(rows, list)
    assert len(rows) >= 16


def test_a_broken_all_reduce_turns_it_red(config: RunConfig, request: pytest.FixtureRequest) -> None:
    layouts = "as-given ranks=2 tensor=2 zero=0"
    sound = verify_layout(config, fp64=True, layouts=layouts, steps=2)
    assert sound["ok"] is True
    request.getfixturevalue("shared")
    broken = verify_layout(config, fp64=True, layouts=layouts, steps=2, train=broken_case)
    assert broken["ok"] is False


@pytest.mark.usefixtures("shared")
def test_resume_is_exact(config: RunConfig) -> None:
    facts = verify_resume(config, steps=4)
    assert facts["ok"] is True, facts
    assert facts["not_legal"] == {}


def forgetful_leg(config: RunConfig, prefix: Path, eos_id: int, root: Path, leg: Leg) -> Outcome:
    """Run a leg whose optimizer forgets its second moments when it resumes."""
    import dist_llm.engine.native as native

    kept = native.NativeEngine.restore

    def restore(engine: native.NativeEngine, facts: dict[str, object]) -> None:
        kept(engine, facts)
        for slot in engine.optimizer.slots:
            slot.exp_avg_sq.zero_()

    native.NativeEngine.restore = restore  # type: ignore[method-assign]
    try:
        return run_leg(config, prefix, eos_id, root, leg)
    finally:
        native.NativeEngine.restore = kept  # type: ignore[method-assign]


@pytest.mark.usefixtures("shared")
def test_a_lost_moment_turns_resume_red(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "run_leg", forgetful_leg)
    monkeypatch.setattr(resume, "MOVES", ())
    assert verify_resume(config, steps=3)["ok"] is False
