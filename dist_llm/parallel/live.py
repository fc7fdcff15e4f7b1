"""Bytes of model state that are really allocated on this rank, counted from live tensors, each storage once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
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


def parameters(model: nn.Module) -> list[Tensor | None]:
    """Return the stored parameters and their gathered copies."""
    held: list[Tensor | None] = list(model.parameters())
    for group in _fsdp_groups(model):
        for record in group.fsdp_params:
            held.append(record.sharded_param)
            held.extend(getattr(record, "all_gather_outputs", []))
    return held


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of stored parameters and of their gathered copies."""
    return storage_bytes(parameters(model))


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
    """Return the bytes of gradients, reduced or waiting to be."""
    return storage_bytes(gradients(model))
