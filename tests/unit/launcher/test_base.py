"""The map of ranks and the words of a launch; nothing is started."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from dist_llm.config.operations import LauncherConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.errors import LayoutError
from dist_llm.launcher.base import RankPlace, plan_launch, rank_map, worker_argv


def test_tp_varies_fastest_and_pp_slowest() -> None:
    places = rank_map(ParallelConfig(pipeline=2, tensor=2), nproc=4, nodes=2)
    assert [(place.pp, place.dp, place.cp, place.tp) for place in places] == [
        (0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0), (0, 1, 0, 1),
        (1, 0, 0, 0), (1, 0, 0, 1), (1, 1, 0, 0), (1, 1, 0, 1),
    ]  # fmt: skip
    assert [place.node for place in places] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert places[6] == RankPlace(rank=6, pp=1, dp=1, cp=0, tp=0, node=1, local_rank=2)


def test_context_lies_between_data_and_tensor() -> None:
    places = rank_map(ParallelConfig(context=2, tensor=2, data=2), nproc=8, nodes=1)
    assert places[5] == RankPlace(rank=5, pp=0, dp=1, cp=0, tp=1, node=0, local_rank=5)


@pytest.mark.parametrize("parallel", [ParallelConfig(pipeline=2, tensor=2), ParallelConfig(data=4)])
def test_ranks_that_do_not_fill_the_mesh_are_refused(parallel: ParallelConfig) -> None:
    with pytest.raises(LayoutError, match=r"launcher.nproc=3 .* use 4"):
        rank_map(parallel, nproc=3, nodes=1)


def test_the_printed_command_is_the_command() -> None:
    argv = worker_argv(["experiment=quickstart", "run.name=it's; $(mine)"])
    assert argv[:4] == [sys.executable, "-m", "dist_llm", "train"]
    plan = plan_launch(argv, LauncherConfig(nproc=2), ParallelConfig(tensor=2))
    lines = str(plan).splitlines()
    assert lines[0] == "launcher=local: 2 ranks on one node, each running"
    assert shlex.split(lines[1]) == argv
    assert [line.split() for line in lines[3:]] == [
        ["rank", "pp", "dp", "cp", "tp", "node", "local"],
        ["0", "0", "0", "0", "0", "0", "0"],
        ["1", "0", "0", "0", "1", "0", "1"],
    ]


def test_the_plan_is_json() -> None:
    plan = plan_launch(["python"], LauncherConfig(nproc=2), ParallelConfig(tensor=2))
    assert json.loads(json.dumps(plan.as_json()))["ranks"][1]["tp"] == 1
