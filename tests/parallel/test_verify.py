"""`verify layout` and `verify resume`: equal where it is, red where a collective is broken or a state is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_llm.config.decode import decode
from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train import verify
from dist_llm.train import verify_resume as resume
from dist_llm.train.trace import Trace, train_case
from dist_llm.train.verify import verify_layout
from dist_llm.train.verify_resume import Leg, Outcome, run_leg, verify_resume
from tests.parallel.faults import planted
from tests.parallel.tiny import MOE, build, tiny_config
from tests.parallel.verifying import corpus_config, lending


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny run on a text corpus, at a learning rate whose steps do not amplify rounding."""
    return corpus_config(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def shared(pool: WorkerPool) -> Iterator[None]:
    """Let it use the ranks that are there, where it would start its own."""
    with lending(pool, verify, resume):
        yield


def broken_case(config: RunConfig, prefix: Path, eos_id: int, steps: int, look: int) -> Trace:
    """Train with tensor parallelism's all-reduce dropped."""
    with planted("tp all-reduce dropped"):
        return train_case(config, prefix, eos_id, steps, look)


def _assert_equal(facts: dict[str, object], least: int) -> None:
    assert facts["ok"] is True, facts
    assert facts["not_legal"] == {}
    rows = facts["layouts"]
    assert isinstance(rows, list)
    assert len(rows) >= least


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("precision", ["fp64", pytest.param("bf16", marks=pytest.mark.slow)])
def test_layouts_are_equal_and_all_legal(config: RunConfig, precision: str) -> None:
    """Two steps: the second begins from weights that a whole first one has updated."""
    _assert_equal(verify_layout(config, precision=precision, chosen="quick", steps=2), least=16)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(("precision", "steps"), [("fp64", 4), ("fp32", 20), ("bf16", 3)])
def test_all_layouts_are_equal(config: RunConfig, precision: str, steps: int) -> None:
    """In fp32 at a learning rate whose steps do not amplify rounding, as the promise says."""
    calm = decode({**config.model_dump(), "optimizer": {"lr": 1e-3}}) if precision == "fp32" else config
    _assert_equal(verify_layout(calm, precision=precision, steps=steps), least=60)


@pytest.mark.usefixtures("shared")
def test_a_broken_all_reduce_turns_it_red(config: RunConfig) -> None:
    layouts = "as-given ranks=2 tensor=2 zero=0"
    broken = verify_layout(config, precision="fp64", layouts=layouts, steps=2, train=broken_case)
    assert broken["ok"] is False
    rows = broken["layouts"]
    assert isinstance(rows, list)
    found = rows[0]["first_divergence"]
    assert {key: found[key] for key in ("step", "phase", "parameter", "axis")} == {
        "step": 1,
        "phase": "forward",
        "parameter": "embed",
        "axis": "tp",
    }
    assert found["gap"] > 0.1


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "experts"])
def test_resume_is_exact(config: RunConfig, model: dict[str, object]) -> None:
    """With experts the biases of the routers, which are no parameters, come back too, and experts change ranks."""
    facts = verify_resume(decode({**config.model_dump(), "model": {**config.model.model_dump(), **model}}), steps=3)
    assert facts["ok"] is True, facts
    assert facts["not_legal"] == {}
    cases = facts["cases"]
    assert isinstance(cases, list)
    assert any("expert" in row["case"] for row in cases) is bool(model)


def test_the_bias_of_a_router_is_part_of_what_resumes(config: RunConfig, pool: WorkerPool) -> None:
    held = pool.run(names_of_state, tiny_config({}, MOE), world=1)[0]
    assert sum(name.endswith("router.bias") for name in held) == 3


def names_of_state(config: RunConfig) -> list[str]:
    """Return the names of all that a checkpoint holds."""
    return [tensor.name for tensor in build(config).state().tensors]


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
