"""Which rectangle of every logical tensor this rank holds: the tp share first, then ZeRO's chunk of its rows.

    global row = tp.index * tp_rows (if split on dim 0) + shard.index * ceil(tp_rows / shard.size) + local row

Vocabulary padding lies past the logical shape: it is held and updated (as zeros) but never saved or counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_llm.parallel.tensor import LogicalTensor, ShardTable
from dist_llm.runtime.mesh import Mesh


@dataclass(frozen=True)
class LocalShard:
    """A parameter as this rank stores it.

    tensor: the local storage, padding rows included. offsets: where its first element lies in the logical tensor.
    shape, partial, expert: the logical tensor's. extent: how much of each dim of `tensor` lies inside its shape.
    primary: this rank is the one among its replicas that is counted and saved. split: tp ranks hold other parts of it.
    """

    name: str
    parameter: nn.Parameter
    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    extent: tuple[int, ...]
    primary: bool
    partial: bool
    expert: bool
    split: bool

    def inside(self, tensor: Tensor) -> Tensor:
        """Return the view of a tensor of this shard's local shape that lies inside the logical shape."""
        for dim, length in enumerate(self.extent):
            tensor = tensor.narrow(dim, 0, length)
        return tensor

    def gradient(self) -> Tensor | None:
        """Return the local gradient, or None when there is none."""
        grad = self.parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad


def _offsets(logical: LogicalTensor, whole: torch.Size, rows: int, sharded: bool, mesh: Mesh) -> list[int]:
    """Return the logical offsets of this rank's local tensor; `whole` is the shape of the tp share."""
    offsets = [0] * len(whole)
    if logical.split_dim is not None:
        offsets[logical.split_dim] = mesh.tp.index * whole[logical.split_dim]
    if logical.expert:
        offsets[0] += mesh.expert.ep.index * whole[0]
    if sharded:
        shard = mesh.expert.shard if logical.expert else mesh.shard
        chunk = -(-whole[0] // shard.size)
        offsets[0] += min(shard.index * chunk, whole[0])
    return offsets


def _local_shard(name: str, parameter: nn.Parameter, logical: LogicalTensor, mesh: Mesh, copy: bool) -> LocalShard:
    sharded = isinstance(parameter, DTensor)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local = local.detach()
    offsets = _offsets(logical, parameter.shape, local.shape[0], sharded, mesh)
    extent = [
        max(0, min(size, limit - at)) for size, limit, at in zip(local.shape, logical.shape, offsets, strict=True)
    ]
    replicas = (mesh.expert.replicate, mesh.expert.zero) if logical.expert else (mesh.replicate, mesh.zero)
    replica = replicas[0].index if sharded else replicas[1].index
    primary = replica == 0 and (logical.split_dim is not None or mesh.tp.index == 0) and not copy
    clipped = tuple(min(at, limit) for at, limit in zip(offsets, logical.shape, strict=True))
    facts = (primary, logical.partial, logical.expert, logical.split_dim is not None)
    return LocalShard(name, parameter, local, logical.shape, clipped, tuple(extent), *facts)


def list_shards(model: nn.Module, table: ShardTable, mesh: Mesh, tied: tuple[str, str] | None) -> Iterator[LocalShard]:
    """Yield this rank's shard of every parameter of a stage, once each.

    tied: (logical name, name of the copy): the copy on the last stage carries the logical name and is not primary.
    """
    for name, parameter in model.named_parameters():
        copy = tied is not None and name == tied[1]
        logical_name = tied[0] if copy and tied is not None else name
        yield _local_shard(logical_name, parameter, table[name], mesh, copy)
