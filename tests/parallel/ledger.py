"""The collectives of a step by the mesh's axes: their groups under the names of the axes that they are."""

from __future__ import annotations

from collections import Counter

from dist_llm.runtime.ledger import CollectiveLedger
from dist_llm.runtime.mesh import Mesh


class Ledger(CollectiveLedger):
    """Records every collective that is issued inside it by axis and kind."""

    def __init__(self, mesh: Mesh) -> None:
        expert = mesh.expert
        axes = [mesh.world, mesh.pp, mesh.cp, mesh.tp, mesh.zero, mesh.replicate, mesh.shard]
        axes += [axis for axis in (mesh.context.heads, mesh.context.ring) if axis.name != "cp"]
        axes += [expert.ep, expert.zero, expert.replicate, expert.shard] if expert.ep.size > 1 else []
        if mesh.ends is not None:
            axes.append(mesh.ends)
        names: dict[str, str] = {}
        self.canonical = {axis.name: names.setdefault(axis.group.group_name, axis.name) for axis in axes}
        super().__init__(names)

    def merged(self, by_axis: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
        """Add up axes that are one and the same process group here, as torch shares it (an axis that is the world)."""
        merged: Counter[tuple[str, str]] = Counter()
        for (axis, kind), value in by_axis.items():
            merged[self.canonical[axis], kind] += value
        return dict(merged)
