"""The explicit autograd collectives of tensor and sequence parallelism (Megatron's f, g and their duals).

    forward                  backward
    copy                     all-reduce        (f)
    all-reduce               copy              (g)
    all-gather sequence      reduce-scatter    (f under sequence parallelism, Korthikanti et al. 2022)
    reduce-scatter sequence  all-gather        (g under sequence parallelism)

Hidden states are [B, T, D]; the sequence is dim 1. On an axis of size 1 nothing is issued.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_llm.runtime.mesh import Axis

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of x over the axis, in a new tensor. Issues one all-reduce."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


def _all_gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Join [B, T/n, D] parts into [B, T, D]. Issues one all-gather."""
    parts = x.new_empty((axis.size, *x.shape))
    _all_gather(parts.view(-1, *x.shape[1:]), x.contiguous(), group=axis.group)
    return parts.transpose(0, 1).flatten(1, 2)


def _reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Sum x [B, T, D] over the axis and keep this rank's [B, T/n, D]. Issues one reduce-scatter."""
    parts = x.reshape(x.shape[0], axis.size, -1, *x.shape[2:]).transpose(0, 1).contiguous()
    out = x.new_empty(parts.shape[1:])
    _reduce_scatter(out, parts.view(-1, *parts.shape[2:]), group=axis.group)
    return out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0], ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_sum(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather_sequence(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter_sequence(grads[0], ctx.axis), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter_sequence(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather_sequence(grads[0], ctx.axis), None


def enter_region(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Bring x into the tensor-parallel region: whole on every rank, its gradient summed over tp on the way back.

    x [B, T, D], or [B, T/tp, D] under sequence parallelism; returns [B, T, D].
    """
    out: Tensor = (_GatherSequence if sequence else _Copy).apply(x, axis)  # type: ignore[no-untyped-call]
    return out


def leave_region(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Sum the partial x [B, T, D] over tp; under sequence parallelism keep this rank's [B, T/tp, D]."""
    out: Tensor = (_ReduceScatterSequence if sequence else _Reduce).apply(x, axis)  # type: ignore[no-untyped-call]
    return out
