"""Counts the collectives that really reach torch's dispatcher, by axis and kind, with their payload bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dist_llm.runtime.mesh import Mesh

KINDS = {
    "c10d.allreduce_.default": "all_reduce",
    "c10d._allgather_base_.default": "all_gather",
    "c10d._reduce_scatter_base_.default": "reduce_scatter",
    "c10d.send.default": "send",
    "c10d.alltoall_base_.default": "all_to_all",
}
QUIET = ("c10d.recv_.default",)


class Ledger(TorchDispatchMode):
    """Records every c10d operation issued inside it; an unknown one is recorded under its own name."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        expert = mesh.expert
        axes = [mesh.world, mesh.pp, mesh.cp, mesh.tp, mesh.zero, mesh.replicate, mesh.shard]
        axes += [axis for axis in (mesh.context.heads, mesh.context.ring) if axis.name != "cp"]
        axes += [expert.ep, expert.zero, expert.replicate, expert.shard] if expert.ep.size > 1 else []
        if mesh.ends is not None:
            axes.append(mesh.ends)
        self._names: dict[str, str] = {}
        self.canonical = {axis.name: self._names.setdefault(axis.group.group_name, axis.name) for axis in axes}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def merged(self, by_axis: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
        """Add up axes that are one and the same process group here, as torch shares it (an axis that is the world)."""
        merged: Counter[tuple[str, str]] = Counter()
        for (axis, kind), value in by_axis.items():
            merged[self.canonical[axis], kind] += value
        return dict(merged)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and name not in QUIET:
            self._record(name, args)
        return func(*args, **(kwargs or {}))

    @torch.compiler.disable
    def _record(self, name: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        tensors = [
            tensor
            for arg in args
            for tensor in (arg if isinstance(arg, list | tuple) else [arg])
            if isinstance(tensor, torch.Tensor)
        ]
        key = (self._names.get(group.group_name, group.group_name), KINDS.get(name, name))
        self.counts[key] += 1
        # Of an all-to-all the input, which comes last.
        sizes = [tensor.nbytes for tensor in tensors]
        self.bytes[key] += sizes[-1] if key[1] == "all_to_all" else max(sizes, default=0)
