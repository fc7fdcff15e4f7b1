"""The mesh of process groups: axes pp, dp, cp, tp (tp varies fastest), and those derived from them.

rank = ((pp * DP + dp) * CP + cp) * TP + tp
zero     dp x cp folded into one axis: replicas of a parameter; replicate x shard is the same axis cut in two (HSDP)
context  cp cut in two where context_method is mixed: neighbours that exchange heads, and rings across them
ep       neighbours on zero, each with a part of the experts; what is left of zero are the replicas of an expert
ends     first and last pipeline rank at equal (dp, cp, tp): the two copies of a tied embedding; none where a
         schedule in a V puts first and last stage on one rank
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dist_llm.config.parallel import V_SCHEDULES, ParallelConfig


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis: its process group, its index in it and the group's size."""

    name: str
    group: dist.ProcessGroup
    index: int
    size: int


@dataclass(frozen=True)
class ContextAxes:
    """The cp axis, and the two that its ranks make up for attention: index = ring.index * heads.size + heads.index.

    heads varies fastest: its all-to-all carries the more the fewer links lie between its ranks. Where one of the two
    has one rank the other is cp itself, and that one's group is used for nothing.
    """

    whole: Axis
    heads: Axis
    ring: Axis


@dataclass(frozen=True)
class ExpertAxes:
    """The axes of experts: ep, and the replicas of an expert as Mesh has them for other weights.

    Where ep has one rank they are the same, and its own group is used for nothing.
    """

    ep: Axis
    zero: Axis
    replicate: Axis
    shard: Axis
    zero_mesh: DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """All axes of the run as seen from this rank, passed down explicitly."""

    device: torch.device
    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    zero: Axis
    replicate: Axis
    shard: Axis
    world: Axis
    ends: Axis | None
    zero_mesh: DeviceMesh
    expert: ExpertAxes
    context: ContextAxes


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    group = mesh.get_group(name)
    return Axis(name, group, mesh.get_local_rank(name), group.size())


def _ends_axis(ranks: torch.Tensor, timeout: timedelta) -> Axis | None:
    """Create the group of first and last pipeline rank for every (dp, cp, tp); every rank takes part in each."""
    if ranks.shape[0] == 1:
        return None
    mine: Axis | None = None
    pairs = torch.stack((ranks[0].flatten(), ranks[-1].flatten()), dim=1).tolist()
    for pair in pairs:
        group = dist.new_group(pair, timeout=timeout)
        if dist.get_rank() in pair:
            mine = Axis("ends", group, pair.index(dist.get_rank()), 2)
    return mine


def build_control_group(timeout_seconds: float) -> dist.ProcessGroup:
    """Return a CPU group over all ranks for saving and agreeing to stop. Collective over the world."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return group


def _context_mesh(parallel: ParallelConfig, data: int, device: torch.device) -> DeviceMesh | None:
    """Create the mesh that cuts cp in rings and the ranks that exchange heads; None where one of these is all of cp."""
    if 1 in (parallel.head_ranks, parallel.ring_ranks):
        return None
    shape = (parallel.pipeline, data, parallel.ring_ranks, parallel.head_ranks, parallel.tensor)
    return init_device_mesh(device.type, shape, mesh_dim_names=("ring_pp", "ring_dp", "cp_ring", "cp_heads", "ring_tp"))


def _context_axes(mesh: DeviceMesh | None, cp: Axis, parallel: ParallelConfig) -> ContextAxes:
    """Return the axes of the mesh, or cp and an axis of one rank."""
    if mesh is not None:
        return ContextAxes(cp, _axis(mesh, "cp_heads"), _axis(mesh, "cp_ring"))
    alone = Axis("cp", cp.group, 0, 1)
    return ContextAxes(cp, cp, alone) if parallel.ring_ranks == 1 else ContextAxes(cp, alone, cp)


def _expert_meshes(parallel: ParallelConfig, replicas: int, device: torch.device) -> list[DeviceMesh]:
    """Create the meshes that cut ep out of zero: one with its replicas cut in two, one with them whole."""
    if parallel.expert == 1:
        return []
    copies = replicas // parallel.expert
    replicate = copies if parallel.zero == 0 else parallel.replicate
    shape = (parallel.pipeline, replicate, copies // replicate, parallel.expert, parallel.tensor)
    names = ("expert_pp", "expert_replicate", "expert_shard", "ep", "expert_tp")
    cut = init_device_mesh(device.type, shape, mesh_dim_names=names)
    whole = (parallel.pipeline, copies, parallel.expert, parallel.tensor)
    names = ("whole_pp", "expert_zero", "whole_ep", "whole_tp")  # type: ignore[assignment]
    return [cut, init_device_mesh(device.type, whole, mesh_dim_names=names)]


def _expert_axes(meshes: list[DeviceMesh], without: ExpertAxes) -> ExpertAxes:
    """Return the axes of the meshes, or those without expert parallelism where there are none."""
    if not meshes:
        return without
    cut, whole = meshes
    names = ("expert_replicate", "expert_shard")
    zero_mesh = cut[names] if cut.size(1) > 1 else cut["expert_shard"]
    replicate, shard = (_axis(cut, name) for name in names)
    return ExpertAxes(_axis(cut, "ep"), _axis(whole, "expert_zero"), replicate, shard, zero_mesh)


_set_timeout: Any = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
"""Public from torch 2.15 on."""


def _limit(mesh: DeviceMesh, timeout: timedelta) -> None:
    """Set the timeout of a mesh's groups: DeviceMesh has none of its own, and torch's are 30 (gloo) or 10 minutes."""
    if dist.get_backend() == "fake":
        return
    for group in mesh.get_all_groups():
        _set_timeout(timeout, group)


def _data_ranks(parallel: ParallelConfig, world: int) -> int:
    """Return the size of the data axis. Raises ValueError where the axes do not make up the world."""
    data, rest = divmod(world, parallel.model_ranks)
    if rest or parallel.data not in (None, data):
        raise ValueError(f"tensor x pipeline x context x data do not make up {world} ranks")
    if data % parallel.replicate or (parallel.zero == 0 and parallel.replicate > 1):
        raise ValueError(
            f"{parallel.replicate} replicas of shards cannot share {data} data ranks under ZeRO {parallel.zero}"
        )
    if data // parallel.replicate * parallel.context % parallel.expert:
        raise ValueError(f"{parallel.expert} expert ranks do not divide the ranks that share a replica")
    if parallel.context % parallel.context_heads or (parallel.context_heads > 1 and parallel.context_method != "mixed"):
        raise ValueError(f"{parallel.context_heads} of {parallel.context} context ranks cannot exchange heads")
    return data


def build_mesh(parallel: ParallelConfig, device: torch.device, timeout_seconds: float = 600.0) -> Mesh:
    """Create the process groups of the layout.

    Collective over the world: every rank creates every group. The world's size must be tensor * pipeline * context *
    data, which the config check has established; the data size is derived here. A collective that takes longer than the
    timeout fails.
    """
    world = dist.get_world_size()
    timeout = timedelta(seconds=timeout_seconds)
    data = _data_ranks(parallel, world)
    shape = (parallel.pipeline, data, parallel.context, parallel.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp", "cp", "tp"))
    replicas = data * parallel.context
    replicate = replicas if parallel.zero == 0 else parallel.replicate
    folded_shape = (parallel.pipeline, replicate, replicas // replicate, parallel.tensor)
    folded = init_device_mesh(device.type, folded_shape, mesh_dim_names=("pp_", "replicate", "shard", "tp_"))
    whole = init_device_mesh(
        device.type, (parallel.pipeline, replicas, parallel.tensor), mesh_dim_names=("p", "zero", "t")
    )
    experts = _expert_meshes(parallel, replicas, device)
    rings = _context_mesh(parallel, data, device)
    for folding in (mesh, folded, whole, *experts, *([] if rings is None else [rings])):
        _limit(folding, timeout)
    zero_mesh = folded["replicate", "shard"] if replicate > 1 else folded["shard"]
    zero, replicated, sharded = _axis(whole, "zero"), _axis(folded, "replicate"), _axis(folded, "shard")
    tp, cp = _axis(mesh, "tp"), _axis(mesh, "cp")
    return Mesh(
        device=device,
        pp=_axis(mesh, "pp"),
        dp=_axis(mesh, "dp"),
        cp=cp,
        tp=tp,
        zero=zero,
        replicate=replicated,
        shard=sharded,
        world=Axis("world", dist.group.WORLD, dist.get_rank(), world),  # type: ignore[arg-type]
        ends=None if parallel.schedule in V_SCHEDULES else _ends_axis(torch.arange(world).view(shape), timeout),
        zero_mesh=zero_mesh,
        expert=_expert_axes(experts, ExpertAxes(Axis("ep", tp.group, 0, 1), zero, replicated, sharded, zero_mesh)),
        context=_context_axes(rings, cp, parallel),
    )
