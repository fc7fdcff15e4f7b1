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
from jaxtyping import Float, Num
from torch import Tensor

from dist_llm.runtime.mesh import Axis
from dist_llm.runtime.reduce_scatter import reduce_scatter

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce_sum(x: Num[Tensor, "*shape"], axis: Axis) -> Num[Tensor, "*shape"]:
    """Return the sum of x over the axis, in a new tensor. Issues one all-reduce."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


def _all_gather_sequence(
    x: Float[Tensor, "batch part width"], axis: Axis
) -> Float[Tensor, "batch {axis.size}*part width"]:
    """Join the parts of a sequence. Issues one all-gather."""
    parts = x.new_empty((axis.size, *x.shape))
    _all_gather(parts.view(-1, *x.shape[1:]), x.contiguous(), group=axis.group)
    return parts.transpose(0, 1).flatten(1, 2)


def _reduce_scatter_sequence(
    x: Float[Tensor, "batch seq width"], axis: Axis
) -> Float[Tensor, "batch seq//{axis.size} width"]:
    """Sum x over the axis and keep this rank's part of the sequence. Issues one reduce-scatter."""
    parts = x.reshape(x.shape[0], axis.size, -1, *x.shape[2:]).transpose(0, 1).contiguous()
    out = x.new_empty(parts.shape[1:])
    reduce_scatter(out, parts.view(-1, *parts.shape[2:]), axis.group)
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


def enter_region(x: Float[Tensor, "batch seq width"], axis: Axis, sequence: bool) -> Float[Tensor, "batch _ width"]:
    """Bring x into the tensor-parallel region: whole on every rank, its gradient summed over tp on the way back.

    Under sequence parallelism x is this rank's part of the sequence; what comes back is the whole.
    """
    out: Tensor = (_GatherSequence if sequence else _Copy).apply(x, axis)  # type: ignore[no-untyped-call]
    return out


def leave_region(x: Float[Tensor, "batch seq width"], axis: Axis, sequence: bool) -> Float[Tensor, "batch _ width"]:
    """Sum the partial x over tp; under sequence parallelism keep this rank's part of the sequence."""
    out: Tensor = (_ReduceScatterSequence if sequence else _Reduce).apply(x, axis)  # type: ignore[no-untyped-call]
    return out
