"""Who am I: the rank that torchrun, mpirun or srun gave this process, read from the environment. No torch.

Asked in this order, because a torchrun agent may itself be a task of srun or mpirun:
RANK ... (torchrun) > OMPI_COMM_WORLD_* (Open MPI) > PMI_* (MPICH, Intel MPI) > SLURM_PROCID of an srun step > alone.
Invariant: 0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size, or a LayoutError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dist_llm.errors import LayoutError, Violation


@dataclass(frozen=True)
class RankInfo:
    """Place of this process in the job (rank of world_size) and on its node (local_rank of local_world_size)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def one_node(self) -> bool:
        """Whether every rank of the job runs on this node."""
        return self.local_world_size == self.world_size

    @property
    def nodes(self) -> int:
        """How many nodes the ranks run on, each with as many as this one."""
        return self.world_size // self.local_world_size


@dataclass(frozen=True)
class _Names:
    """The four variables by which one kind of launcher names a rank."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str

    @property
    def all(self) -> tuple[str, str, str, str]:
        return self.rank, self.world_size, self.local_rank, self.local_world_size


_LAUNCHERS = (
    _Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Names(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
# An sbatch script and an salloc shell carry SLURM_PROCID too; only a task of an srun step has SLURM_STEP_NUM_TASKS.
_SLURM = _Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def discover_ranks(env: Mapping[str, str] | None = None) -> RankInfo:
    """Read this process's rank from the variables of whichever launcher started it; alone without any.

    env None: the environment of this process.
    Raises LayoutError when they are incomplete, not numbers, or contradict each other.
    """
    env = os.environ if env is None else env
    under_slurm = _SLURM.rank in env and _SLURM.world_size in env
    for names in _LAUNCHERS:
        # srun's pmi2 plugin sets PMI_RANK and PMI_SIZE as MPICH does, but not where a rank is on its node.
        from_srun = under_slurm and names.local_rank not in env
        if not from_srun and (names.rank in env or names.world_size in env):
            return _read(env, names)
    if under_slurm:
        tasks = _slurm_tasks_here(env)
        return _read({**env, **({_SLURM.local_world_size: str(tasks)} if tasks is not None else {})}, _SLURM)
    return RankInfo(0, 1, 0, 1)


def _read(env: Mapping[str, str], names: _Names) -> RankInfo:
    """Read and check the four numbers that `names` names."""
    wrong: list[Violation] = []
    numbers: list[int] = []
    for name in names.all:
        text = env.get(name)
        if text is not None and re.fullmatch(r"[0-9]{1,9}", text):
            numbers.append(int(text))
        else:
            wrong.append(
                Violation(name, text, f"must be a number: {names.launcher} sets it with the other rank variables")
            )
    if wrong:
        raise LayoutError(wrong)
    ranks = RankInfo(*numbers)
    if not ranks.rank < ranks.world_size:
        wrong.append(Violation(names.rank, ranks.rank, f"must be below {names.world_size}={ranks.world_size}"))
    if not ranks.local_rank < ranks.local_world_size:
        rule = f"must be below {names.local_world_size}={ranks.local_world_size}"
        wrong.append(Violation(names.local_rank, ranks.local_rank, rule))
    if not ranks.local_world_size <= ranks.world_size:
        rule = f"must not exceed {names.world_size}={ranks.world_size}"
        wrong.append(Violation(names.local_world_size, ranks.local_world_size, rule))
    if wrong:
        raise LayoutError(wrong)
    return ranks


def _slurm_tasks_here(env: Mapping[str, str]) -> int | None:
    """Return how many tasks of this srun step run on this node, from a list such as `4(x2),1`; None if unreadable."""
    counts: list[int] = []
    for part in env.get(_SLURM.local_world_size, "").split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            return None
        counts.extend([int(match[1])] * int(match[2] or 1))
    node = env.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None
