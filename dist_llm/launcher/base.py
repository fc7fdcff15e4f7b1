"""What every launcher shares: the worker's command, the map of ranks onto the mesh axes and nodes, and the dry run.

    rank = ((pp * DP + dp) * CP + cp) * TP + tp
    node = rank // nproc, local_rank = rank % nproc

tp varies fastest: its traffic is the heaviest, so its ranks are neighbours and share a node wherever they can.
Nothing here starts a process or imports torch.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dist_llm.config.operations import LauncherConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.errors import LayoutError, Violation


@dataclass(frozen=True)
class RankPlace:
    """Where one rank sits: its index on each mesh axis, its node and its number on that node."""

    rank: int
    pp: int
    dp: int
    cp: int
    tp: int
    node: int
    local_rank: int


@dataclass(frozen=True)
class LaunchPlan:
    """What a launch would start: `nproc` copies of `argv` on each node, and the place of every rank."""

    launcher: str
    argv: tuple[str, ...]
    nodes: int
    nproc: int
    ranks: tuple[RankPlace, ...]

    def as_json(self) -> dict[str, object]:
        """Return the plan as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        ranks = f"{self.nproc} rank{'s' if self.nproc > 1 else ''}"
        nodes = f"each of {self.nodes} nodes" if self.nodes > 1 else "one node"
        width = max(5, len(str(len(self.ranks))))
        names = ("rank", "pp", "dp", "cp", "tp", "node", "local")
        lines = [
            f"launcher={self.launcher}: {ranks} on {nodes}, each running",
            f"  {shlex.join(self.argv)}",
            "",
            " ".join(f"{name:>{width}}" for name in names),
        ]
        for place in self.ranks:
            values = (place.rank, place.pp, place.dp, place.cp, place.tp, place.node, place.local_rank)
            lines.append(" ".join(f"{value:>{width}}" for value in values))
        return "\n".join(lines)


def worker_argv(arguments: Sequence[str]) -> list[str]:
    """Return the command of one rank: `python -m dist_llm train` with the words that the launch was given."""
    return [sys.executable, "-m", "dist_llm", "train", *arguments]


def plan_launch(argv: Sequence[str], launcher: LauncherConfig, parallel: ParallelConfig) -> LaunchPlan:
    """Return what the launcher would start. Raises LayoutError when the ranks do not fill the mesh."""
    ranks = rank_map(parallel, launcher.nproc, launcher.nodes)
    return LaunchPlan(launcher.name, tuple(argv), launcher.nodes, launcher.nproc, ranks)


def rank_map(parallel: ParallelConfig, nproc: int, nodes: int) -> tuple[RankPlace, ...]:
    """Return the place of every rank of a job of `nodes` x `nproc` ranks; `parallel.data` is derived when it is unset.

    Raises LayoutError when tensor x pipeline x context (x data) does not make up the number of ranks.
    """
    world_size = nproc * nodes
    model_ranks = parallel.model_ranks
    data = parallel.data if parallel.data is not None else max(1, world_size // model_ranks)
    if data * model_ranks != world_size:
        rule = f"times launcher.nodes={nodes} must be the ranks of the layout, {data} x {model_ranks}"
        raise LayoutError([Violation("launcher.nproc", nproc, rule, (data * model_ranks // nodes or 1,))])
    places = []
    for rank in range(world_size):
        rest, tp = divmod(rank, parallel.tensor)
        rest, cp = divmod(rest, parallel.context)
        pp, dp = divmod(rest, data)
        places.append(RankPlace(rank, pp, dp, cp, tp, node=rank // nproc, local_rank=rank % nproc))
    return tuple(places)
