"""The pool gives back values by rank, a user's error as it was, a bug with its traceback, and survives a dead rank."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from dist_llm.errors import DataError, PeerLostError
from dist_llm.runtime.pool import RankFailure, WorkerPool


def rank_times(factor: int) -> int:
    """Return this rank times a factor."""
    return dist.get_rank() * factor


def damaged() -> None:
    """Fail on rank 1 as a damaged file does."""
    if dist.get_rank() == 1:
        raise DataError("tokens.bin is cut short")


def mistaken() -> None:
    """Fail on rank 1 as a bug does."""
    if dist.get_rank() == 1:
        raise KeyError("wq")


def killed() -> None:
    """Kill rank 1."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def stuck_after_failure() -> None:
    """Fail on rank 0 while rank 1 never answers."""
    if dist.get_rank() == 0:
        raise KeyError("wq")
    time.sleep(3600)


def test_values_come_back_by_rank(pool: WorkerPool) -> None:
    assert pool.run(rank_times, 10, world=3) == [0, 10, 20]


def test_a_users_error_is_raised_as_it_was(pool: WorkerPool) -> None:
    with pytest.raises(DataError, match="cut short"):
        pool.run(damaged, world=2)


def test_a_bug_comes_with_its_traceback(pool: WorkerPool) -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1: Traceback.*KeyError: 'wq'"):
        pool.run(mistaken, world=2)


def test_a_dead_or_hanging_rank_is_a_lost_peer_and_the_next_job_runs() -> None:
    with WorkerPool(2, timeout_seconds=5.0) as own:
        for job, says in ((killed, "died"), (stuck_after_failure, "(?s)hang after another failed.*Traceback")):
            with pytest.raises(PeerLostError, match=says):
                own.run(job, world=2)
        assert own.run(rank_times, 2, world=1) == [0]


def interrupted() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return "unmoved"


def test_ctrl_c_is_left_to_the_parent(pool: WorkerPool) -> None:
    assert pool.run(interrupted, world=1) == ["unmoved"]


def test_a_job_larger_than_the_pool_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="cannot run a job"):
        pool.run(rank_times, 1, world=pool.size + 1)


def leave_groups_in_a_cycle() -> None:
    """Make groups of their own that only the garbage collector frees, as pipeline stages and meshes do."""
    keeper: dict[str, object] = {"groups": [dist.new_group(ranks=[0, 1]) for _ in range(8)]}
    keeper["self"] = keeper


def leave_groups_to_an_error() -> None:
    """Make groups that the frames of a user's error hold."""
    keeper: dict[str, object] = {"groups": [dist.new_group(ranks=[0, 1]) for _ in range(8)]}
    keeper["self"] = keeper
    raise DataError("with groups")


def threads() -> int:
    """Return the number of threads of this rank."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_jobs_groups_and_their_threads_end_with_it(pool: WorkerPool) -> None:
    """Each group keeps threads that poll; left to the collector they slow down all later jobs."""
    pool.run(leave_groups_in_a_cycle, world=2)
    after_one = pool.run(threads, world=2)
    for _ in range(3):
        pool.run(leave_groups_in_a_cycle, world=2)
        with pytest.raises(DataError):
            pool.run(leave_groups_to_an_error, world=2)
    assert pool.run(threads, world=2) == after_one


def shard_once(size: int) -> None:
    """Lay a tensor out over a mesh of one rank, as ZeRO does."""
    mesh = init_device_mesh("cpu", (1,) * size)
    whole = distribute_tensor(torch.ones(4), mesh, [Replicate()] * size)
    assert float((whole + whole).sum().full_tensor()) == 8.0


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_caches_of_torch_keep_no_groups(pool: WorkerPool) -> None:
    """DTensor's caches are keyed by meshes, so each new layout would stay, and its threads would poll on."""
    pool.run(shard_once, 1, world=1)
    after_one = pool.run(threads, world=1)
    for size in (2, 3, 4):
        pool.run(shard_once, size, world=1)
    assert pool.run(threads, world=1) == after_one


def counted_up(start: int) -> Iterator[tuple[int, int]]:
    """Yield how often it was asked, and the sum of that over ranks; fail on the last rank when asked a fourth time."""
    for asked in range(start, start + 4):
        total = torch.tensor(asked)
        dist.all_reduce(total)
        if asked == 3 and dist.get_rank() == dist.get_world_size() - 1:
            raise KeyError("wq")
        yield asked, int(total)


def test_a_generator_goes_on_where_it_was() -> None:
    with WorkerPool(2, timeout_seconds=5.0) as own:
        assert list(own.stream(counted_up, 10, world=2)) == [[(n, 2 * n)] * 2 for n in range(10, 14)]
        two = own.stream(counted_up, 4, world=2)
        assert next(two) == [(4, 8), (4, 8)]
        two.close()  # type: ignore[attr-defined]
        assert own.run(rank_times, 2, world=2) == [0, 2]


def test_a_generator_that_fails_ends_with_its_traceback() -> None:
    with WorkerPool(2, timeout_seconds=5.0) as own:
        values = own.stream(counted_up, 2, world=2)
        assert next(values) == [(2, 4), (2, 4)]
        with pytest.raises(RankFailure, match=r"(?s)rank 1: Traceback.*KeyError: 'wq'"):
            next(values)
        assert own.run(rank_times, 3, world=2) == [0, 3]


def two_threads(rank: int) -> torch.device:
    """Compute with two threads."""
    torch.set_num_threads(2)
    return torch.device("cpu")


def refuse(rank: int) -> torch.device:
    """Find no device."""
    raise DataError("there is no such device")


def test_ranks_are_prepared_as_asked() -> None:
    with WorkerPool(1, prepare=two_threads) as own:
        assert own.run(torch.get_num_threads, world=1) == [2]
    with WorkerPool(1, prepare=refuse) as own, pytest.raises(DataError, match="no such device"):
        own.run(rank_times, 2, world=1)
