"""Asynchronous tensor parallelism: sequence parallelism's collectives in step with the products beside them.

    entering a region    all-gather x, x W^T of each column linear    backward    sum of g W, reduce-scatter
    row linear           x W^T, reduce-scatter                        backward    all-gather g, g W

While one piece is multiplied the next travels, through memory that the ranks of a node map (Wang et al. 2023). The
kernels are torch's, over its symmetric memory on CUDA; what travels is what the plain collectives carry.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dist_llm.ops.linear import Linear, WeightGradients, leave_or_give
from dist_llm.parallel.tensor import RowParallelLinear, style_of
from dist_llm.runtime.device import share_memory
from dist_llm.runtime.log import get_logger
from dist_llm.runtime.mesh import Axis
from dist_llm.types import ShardPlan, Style

log = get_logger(__name__)


def gather_products(x: Tensor, matrices: list[Tensor], axis: Axis) -> tuple[Tensor, list[Tensor]]:
    """Return x of the whole sequence, and its product with each matrix. Carries an all-gather of x over the axis."""
    group = axis.group.group_name
    whole, products = torch.ops.symm_mem.fused_all_gather_matmul(x.contiguous(), matrices, 1, group)
    return whole, list(products)


def product_scatter(x: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
    """Return this rank's part of the sequence of the sum of x @ matrix. Carries a reduce-scatter over the axis."""
    group = axis.group.group_name
    out: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x.contiguous(), matrix, "sum", 1, group)
    return out


class _EnterColumns(torch.autograd.Function):
    """(part of x, weights, biases) to (whole x, the columns' outputs); no gradient comes to the whole x by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, later: WeightGradients | None, *pairs: Tensor | None) -> Any:
        weights, biases = pairs[::2], pairs[1::2]
        whole, outs = gather_products(x, [weight.t() for weight in weights if weight is not None], axis)
        ctx.axis, ctx.later, ctx.pairs = axis, later, pairs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(whole)
        ctx.mark_non_differentiable(whole)
        added = (out if bias is None else out + bias for out, bias in zip(outs, biases, strict=True))
        return whole, *added

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (whole,), outs = ctx.saved_tensors, grads[1:]
        weights, biases = ctx.pairs[::2], ctx.pairs[1::2]
        grad_x = product_scatter(torch.cat(outs, dim=-1), torch.cat(weights), ctx.axis)
        given: list[Tensor | None] = []
        for weight, bias, grad in zip(weights, biases, outs, strict=True):
            given.extend(leave_or_give(ctx.later, whole, grad, weight, bias))
        return grad_x, None, None, *given


class _RowScatter(torch.autograd.Function):
    """x W^T of this rank's features to this rank's part of the sequence of the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, later: WeightGradients | None) -> Tensor:
        ctx.axis, ctx.later, ctx.weight = axis, later, weight
        ctx.save_for_backward(x)
        return product_scatter(x, weight.t(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        whole, (grad_x,) = gather_products(grads[0], [ctx.weight], ctx.axis)
        grad_weight, _ = leave_or_give(ctx.later, x, whole, ctx.weight, None)
        return grad_x, grad_weight, None, None


class AsyncColumnLinear(Linear):
    """A column linear whose output was made as its region was entered."""

    ready: Tensor

    def forward(self, x: Float[Tensor, "batch seq inputs"]) -> Float[Tensor, "batch seq outputs"]:
        """Hand the output over."""
        out = self.ready
        del self.ready
        return out


class AsyncRowLinear(RowParallelLinear):
    """A row linear whose product and reduce-scatter go on together."""

    def forward(self, x: Float[Tensor, "batch seq inputs"]) -> Float[Tensor, "batch part outputs"]:
        """Map this rank's inputs to its part of the sequence. Carries a reduce-scatter over tp."""
        out: Tensor = _RowScatter.apply(x, self.weight, self.axis, self.later)  # type: ignore[no-untyped-call]
        bias: Tensor | None = self.bias
        return out if bias is None else out + bias


def _entrance(columns: list[AsyncColumnLinear], axis: Axis) -> Any:
    def gather(x: Float[Tensor, "batch part width"]) -> Float[Tensor, "batch seq width"]:
        pairs = [parameter for column in columns for parameter in (column.weight, column.bias)]
        whole, *outs = _EnterColumns.apply(x, axis, columns[0].later, *pairs)  # type: ignore[no-untyped-call]
        for column, out in zip(columns, outs, strict=True):
            column.ready = out
        entered: Tensor = whole
        return entered

    return gather


def apply_async_tensor(model: nn.Module, plan: ShardPlan, axis: Axis, device: torch.device) -> None:
    """Join products and collectives of a model that is split with sequence parallelism, in place.

    Of a region that begins with column linears; a layer of experts keeps the plain collectives. Where the ranks of the
    axis cannot share memory all do, and rank 0 says so. Issues one all-reduce of a number over tp on CUDA.
    """
    if axis.size == 1:
        return
    if not share_memory(axis.group, device):
        log.info("parallel.async_tensor has no effect: it needs CUDA devices that map each other's memory")
        return
    for path, module in model.named_modules():
        if style_of(plan, path) is not Style.REGION:
            continue
        below = [(child, style_of(plan, f"{path}.{name}")) for name, child in module.named_children()]
        columns: list[Any] = [child for child, style in below if style is Style.COLUMN]
        for child in columns:
            child.__class__ = AsyncColumnLinear
        for child, style in below:
            if style is Style.ROW:
                child.__class__ = AsyncRowLinear
        if columns:
            module.gather = _entrance(columns, axis)
