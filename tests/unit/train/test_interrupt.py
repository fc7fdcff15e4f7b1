"""Ranks end a step together: a signal or a failed hook of one rank is every rank's."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

from dist_llm.errors import DistLLMError, StorageError
from dist_llm.runtime.mesh import build_control_group
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.interrupt import Interruption
from dist_llm.types import StepRecord

RECORD = StepRecord(1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, None, 1.0)


def full_disk(record: StepRecord) -> None:
    """Fail as a write into a full disk does."""
    raise StorageError("cannot write metrics.jsonl: No space left on device")


def outcomes(event: str) -> list[str]:
    """Return how three boundaries of this rank ended when `event` happened to rank 1 before the second."""
    interruption = Interruption(build_control_group(30.0))
    hook = interruption.shield(full_disk)
    ends = []
    for step in range(3):
        if step == 1 and dist.get_rank() == 1:
            if event.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[event])
            else:
                hook(RECORD)
        try:
            ends.append(str(interruption.agreed()))
        except DistLLMError as error:
            ends.append(f"{type(error).__name__} {error.shared} {error}")
            break
    interruption.close()
    return ends


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_one_rank_stops_all(name: str, pool: WorkerPool) -> None:
    assert pool.run(outcomes, name, world=3) == [["False", "True", "True"]] * 3


def test_a_failed_hook_of_one_rank_is_every_ranks_error(pool: WorkerPool) -> None:
    message = "StorageError True rank 1: cannot write metrics.jsonl: No space left on device"
    assert pool.run(outcomes, "full disk", world=3) == [["False", message]] * 3


def impatient() -> str:
    """Press Ctrl-C twice."""
    interruption = Interruption(build_control_group(30.0))
    os.kill(os.getpid(), signal.SIGINT)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        return f"at once, {interruption.agreed()}"
    finally:
        interruption.close()
    return "ignored"


def test_a_second_ctrl_c_is_not_kept_waiting(pool: WorkerPool) -> None:
    assert pool.run(impatient, world=1) == ["at once, True"]


def alone() -> None:
    """Raise in one process what its hook met."""
    interruption = Interruption(build_control_group(30.0))
    interruption.shield(full_disk)(RECORD)
    interruption.agreed()


def test_one_process_raises_its_own_error(pool: WorkerPool) -> None:
    with pytest.raises(StorageError, match="No space left"):
        pool.run(alone, world=1)
