"""Bytes of model state that are really allocated on this rank, counted from live tensors, each storage once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the distinct storages behind the tensors (0 for freed ones)."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _fsdp_groups(model: nn.Module) -> list[Any]:
    """Return FSDP2's records of its units; it has no public way to see gathered copies and unreduced gradients.

    Before torch 2.12 a unit has one record or none.
    """
    groups: list[Any] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups += state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _offloaded(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the shards of parameters that FSDP2 keeps in host memory, and those of their gradients."""
    records = [
        record
        for group in _fsdp_groups(model)
        if isinstance(group.offload_policy, CPUOffloadPolicy)
        for record in group.fsdp_params
    ]
    shards = [record.sharded_param for record in records]
    return shards, [shard.grad for shard in shards if shard.grad is not None]


def host_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and gradients that are kept in host memory for a device."""
    shards, gradients = _offloaded(model)
    return storage_bytes(shards) + storage_bytes(gradients)


def parameters(model: nn.Module) -> list[Tensor | None]:
    """Return the stored parameters and their gathered copies."""
    held: list[Tensor | None] = list(model.parameters())
    for group in _fsdp_groups(model):
        for record in group.fsdp_params:
            held.append(record.sharded_param)
            held.extend(getattr(record, "all_gather_outputs", []))
    return held


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters on the device: stored ones and their gathered copies."""
    away = _offloaded(model)[0]
    return storage_bytes([*parameters(model), *away]) - storage_bytes(away)


def gradients(model: nn.Module) -> list[Tensor | None]:
    """Return the gradients that are there, reduced or waiting to be."""
    held: list[Tensor | None] = [parameter.grad for parameter in model.parameters()]
    for group in _fsdp_groups(model):
        held.append(getattr(group, "_partial_reduce_output", None))
        for record in group.fsdp_params:
            held.append(record.sharded_param.grad)
            held.append(getattr(record, "unsharded_accumulated_grad", None))
            unsharded = getattr(record, "_unsharded_param", None)
            held.append(None if unsharded is None else unsharded.grad)
    return held


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of gradients on the device, reduced or waiting to be."""
    away = _offloaded(model)[1]
    return storage_bytes([*gradients(model), *away]) - storage_bytes(away)
