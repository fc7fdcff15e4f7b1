"""The rank that each launcher's environment means, and what is refused."""

from __future__ import annotations

import pytest

from dist_llm.errors import LayoutError
from dist_llm.runtime.ranks import RankInfo, discover_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize("env", [TORCHRUN, OPEN_MPI, MPICH, SRUN], ids=["torchrun", "openmpi", "mpich", "srun"])
def test_every_launcher_names_the_same_rank(env: dict[str, str]) -> None:
    assert discover_ranks(env) == RankInfo(rank=5, world_size=8, local_rank=1, local_world_size=4)


def test_alone_without_a_launcher() -> None:
    assert discover_ranks({"PATH": "/bin", "SLURM_JOB_ID": "7"}) == RankInfo(0, 1, 0, 1)


def test_a_batch_script_is_not_a_task() -> None:
    # sbatch runs the script with SLURM_PROCID=0 and SLURM_NTASKS=8; taken for rank 0 of 8 it would wait for ever.
    assert discover_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}).world_size == 1


def test_torchrun_inside_srun_wins() -> None:
    outer = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert discover_ranks({**outer, **TORCHRUN}).rank == 5


def test_uneven_nodes_of_srun() -> None:
    env = {**SRUN, "SLURM_PROCID": "8", "SLURM_STEP_NUM_TASKS": "9", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1"}
    assert discover_ranks({**env, "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}) == RankInfo(8, 9, 0, 1)


def test_nodes() -> None:
    assert RankInfo(1, 4, 1, 4).one_node
    assert not RankInfo(1, 8, 1, 4).one_node
    assert [RankInfo(1, world, 1, 4).nodes for world in (4, 8)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"RANK": "8"}, "RANK=8"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "one"}, "RANK=one"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE="),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
    ],
)
def test_contradictions_are_named(change: dict[str, str], key: str) -> None:
    with pytest.raises(LayoutError) as caught:
        discover_ranks({**TORCHRUN, **change})
    assert key in str(caught.value)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("missing", sorted(TORCHRUN))
def test_an_incomplete_environment_names_what_is_missing(missing: str) -> None:
    with pytest.raises(LayoutError, match=f"{missing}=unset"):
        discover_ranks({name: value for name, value in TORCHRUN.items() if name != missing})


def test_unreadable_tasks_per_node_is_refused() -> None:
    with pytest.raises(LayoutError, match="SLURM_STEP_TASKS_PER_NODE"):
        discover_ranks({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "four"})


def test_srun_with_the_pmi2_plugin_is_srun() -> None:
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    }
    ranks = discover_ranks({**slurm, "PMI_RANK": "3", "PMI_SIZE": "4"})
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (3, 4, 1, 2)
