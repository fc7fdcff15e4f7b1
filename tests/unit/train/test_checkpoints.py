"""A run that diverges keeps a checkpoint from before; one that was passed over as damaged does not count as kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dist_llm.config.operations import CheckpointConfig
from dist_llm.runtime.mesh import build_control_group
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.checkpoints import Checkpoints
from dist_llm.types import StepRecord
from tests.parallel.tiny import build, tiny_config

GOOD = StepRecord(1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, None, 1.0)


def checkpoints_at(root: Path, interval: int, keep: int) -> Checkpoints:
    """Return the checkpoints of a tiny run in the current process group."""
    config = CheckpointConfig(interval=interval, keep=keep)
    rest: tuple[dict[str, object], ...] = ({}, {}, {})
    silent = (lambda step: None, lambda message: None)
    return Checkpoints(root, config, build(tiny_config()), build_control_group(60.0), *rest, *silent)


def saved(root: Path) -> list[int]:
    """Return the steps of the checkpoints that are there."""
    return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir())


def run_steps(root: Path, interval: int, keep: int, steps: str) -> list[list[int]]:
    """Take steps, each `.` or `x` for a skipped one, then finish; return what is there after each of these."""
    checkpoints, found = checkpoints_at(root, interval, keep), []
    root.mkdir()
    for step, kind in enumerate(steps, start=1):
        checkpoints.after_step(replace(GOOD, step=step, skipped=kind == "x"))
        found.append(saved(root))
    checkpoints.finish(len(steps), tokens=0)
    return [*found, saved(root)]


def resume_and_finish(root: Path, step: int) -> list[int]:
    """Resume, finish at `step`, and return what is there."""
    checkpoints = checkpoints_at(root, interval=0, keep=2)
    checkpoints.restore(must=True)
    checkpoints.finish(step, tokens=0)
    return saved(root)


def test_no_checkpoint_is_saved_or_deleted_while_steps_are_skipped(pool: WorkerPool, tmp_path: Path) -> None:
    found = pool.run(run_steps, tmp_path / "run", 2, 2, "....xxx..", world=1)[0]
    assert found[3:6] == [[2, 4]] * 3
    # The one that was due at step 6 is saved at step 8; step 9 then shows that step 8 left sound weights.
    assert found[7:] == [[2, 4, 8], [4, 8], [8, 9]]


def test_of_two_the_older_stays_until_a_step_proves_the_newer(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(run_steps, tmp_path / "run", 1, 1, "..x", world=1)[0] == [[1], [1, 2], [1, 2], [1, 2, 3]]


def test_a_checkpoint_that_was_passed_over_does_not_count(pool: WorkerPool, tmp_path: Path) -> None:
    root = tmp_path / "run"
    pool.run(run_steps, root, 1, 9, "...", world=1)
    newest = root / "step-00000003" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert pool.run(resume_and_finish, root, 4, world=1)[0] == [2, 3, 4]
