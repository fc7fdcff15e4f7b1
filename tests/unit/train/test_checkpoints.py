"""A run that diverges keeps a checkpoint from before; a damaged one does not count as kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

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
    """Take steps, each `.` or `x` for a skipped one, then save the last; return what is there after each of these."""
    checkpoints, found = checkpoints_at(root, interval, keep), []
    root.mkdir(exist_ok=True)
    for step, kind in enumerate(steps, start=1):
        checkpoints.after_step(replace(GOOD, step=step, skipped=kind == "x"))
        found.append(saved(root))
        dist.barrier()
    checkpoints.save(len(steps), tokens=0)
    return [*found, saved(root)]


def resume_and_save(root: Path, step: int, keep: int, hurried: bool = False) -> list[int]:
    """Resume, save `step`, and return what is there."""
    checkpoints = checkpoints_at(root, interval=0, keep=keep)
    checkpoints.restore(must=True)
    checkpoints.save(step, tokens=0, hurried=hurried)
    return saved(root)


def skipped_in_a_row(root: Path) -> int:
    """Return the count that a resumed run goes on from."""
    checkpoints = checkpoints_at(root, interval=0, keep=2)
    checkpoints.restore(must=True)
    return checkpoints.skipped_in_a_row


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_saved_or_deleted_while_steps_are_skipped(pool: WorkerPool, tmp_path: Path, ranks: int) -> None:
    # The one that was due at step 6 is saved at step 8.
    found = [[], [2], [2], [2, 4], [2, 4], [2, 4], [2, 4], [4, 8], [4, 8], [8, 9]]
    assert pool.run(run_steps, tmp_path / "run", 2, 2, "....xxx..", world=ranks) == [found] * ranks


def test_a_skipped_step_that_is_the_last_is_saved_beside_the_others(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(run_steps, tmp_path / "run", 1, 1, "..xx", world=2)[0] == [[1], [2], [2], [2], [2, 4]]
    assert pool.run(skipped_in_a_row, tmp_path / "run", world=2) == [2, 2]


def restore_then_mend_and_save(root: Path, content: bytes) -> list[int]:
    """Resume past a checkpoint that cannot be read, which later can, and save an earlier step."""
    checkpoints = checkpoints_at(root, interval=0, keep=1)
    checkpoints.restore(must=True)
    (root / "step-00000004" / "rank-00000.safetensors").write_bytes(content)
    checkpoints.save(3, tokens=0)
    return saved(root)


def test_one_that_was_passed_over_does_not_displace_what_is_saved_later(pool: WorkerPool, tmp_path: Path) -> None:
    root = tmp_path / "run"
    pool.run(run_steps, root, 2, 9, "....", world=1)
    newest = root / "step-00000004" / "rank-00000.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(b"unreadable")
    assert pool.run(restore_then_mend_and_save, root, content, world=1)[0] == [3, 4]


def test_a_hurried_save_deletes_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(run_steps, tmp_path / "run", 1, 9, "..", world=1)
    assert pool.run(resume_and_save, tmp_path / "run", 3, 1, True, world=1)[0] == [1, 2, 3]
    assert pool.run(resume_and_save, tmp_path / "run", 4, 1, world=1)[0] == [4]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_checkpoint_does_not_count_in_any_process(pool: WorkerPool, tmp_path: Path, ranks: int) -> None:
    root = tmp_path / "run"
    pool.run(run_steps, root, 1, 9, "...", world=ranks)
    newest = root / "step-00000003" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert pool.run(resume_and_save, root, 4, 3, world=ranks)[0] == [1, 2, 3, 4]
    assert pool.run(resume_and_save, root, 6, 3, world=ranks)[0] == [2, 3, 4, 6]
