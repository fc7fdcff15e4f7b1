"""Many linear maps at once: rows come sorted by group, and each group has its own matrix: y_r = W_g(r) x_r.

    dx_r = dy_r W_g(r) at once;   dW_g = sum over its rows of dy_r^T x_r, at once or, with a queue, when asked for

On CUDA in bf16 each is torch's grouped GEMM; elsewhere one product a group. A group may have no rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dist_llm.ops.linear import WeightGradients, accumulate
from dist_llm.ops.row_counts import row_counts


def _in_one_kernel(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.bfloat16


def _ends(x: Tensor, counts: Tensor) -> Tensor:
    return counts.to(x.device).cumsum(0).to(torch.int32)


def _products(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Return each row times the matrix [inputs, outputs] of its group."""
    if _in_one_kernel(x):
        out: Tensor = torch._grouped_mm(x, matrices, offs=_ends(x, counts))
        return out
    parts = torch.split(x, row_counts(counts, x.shape[0]))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices.unbind(0), strict=True)])


def _weight_gradient(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Return dy^T x of each group: [groups, outputs, inputs]; zeros for a group without rows."""
    if _in_one_kernel(x):
        out: Tensor = torch._grouped_mm(grad.t(), x, offs=_ends(x, counts))
        return out
    sizes = row_counts(counts, x.shape[0])
    return torch.stack(
        [dy.t() @ rows for dy, rows in zip(torch.split(grad, sizes), torch.split(x, sizes), strict=True)]
    )


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, later: WeightGradients) -> Tensor:
        # As in ops/linear.py the weight is not saved for the backward: recompute would give back a copy.
        ctx.weight, ctx.later = weight, later
        ctx.save_for_backward(x, counts)
        return _products(x, weight.transpose(-2, -1), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        # Detached: what waits must keep no graph alive.
        x, counts = (saved.detach() for saved in ctx.saved_tensors)
        grad, weight = grads[0].contiguous(), ctx.weight
        ctx.later.add(lambda: accumulate(weight, _weight_gradient(grad, x, counts)))
        return _products(grad, weight, counts) if ctx.needs_input_grad[0] else None, None, None, None


def grouped_linear(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "groups outputs inputs"],
    counts: Int64[Tensor, " groups"],
    later: WeightGradients | None = None,
) -> Float[Tensor, "rows outputs"]:
    """Return the rows of x, each times the matrix of its group; `counts` are the rows of each group.

    With `later` a backward leaves the gradient of `weight` there.
    """
    if later is None:
        return _products(x, weight.transpose(-2, -1), counts)
    out: Tensor = _GroupedLinear.apply(x, weight, counts, later)  # type: ignore[no-untyped-call]
    return out
