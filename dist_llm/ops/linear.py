"""A linear map whose weight gradient can wait: y = x W^T + b; dx = dy W at once; dW = dy^T x and db when asked for.

What waits keeps x and dy alive. Source: Qi et al. 2023 (zero bubble): the two halves of a backward at different times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


class WeightGradients:
    """The weight gradients of a stage that have not been computed yet."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def add(self, compute: Callable[[], None]) -> None:
        """Let a gradient wait; `compute` adds it to its weight's `grad`."""
        self._waiting.append(compute)

    def take(self) -> Callable[[], None]:
        """Return what computes all that waits, in the order in which it came, and let go of it."""
        waiting, self._waiting = self._waiting, []

        def compute_all() -> None:
            while waiting:
                waiting.pop(0)()

        return compute_all


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def leave_or_give(
    later: WeightGradients | None,
    x: Float[Tensor, "*rows inputs"],
    grad: Float[Tensor, "*rows outputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of W and b from those of the output; with `later` leave them there and return none."""

    def gradients() -> tuple[Tensor, Tensor | None]:
        rows = grad.reshape(-1, grad.shape[-1])
        return rows.t() @ x.reshape(-1, x.shape[-1]), None if bias is None else rows.sum(dim=0)

    def compute() -> None:
        for parameter, gradient in zip((weight, bias), gradients(), strict=True):
            if parameter is not None and gradient is not None:
                _accumulate(parameter, gradient)

    if later is None:
        return gradients()
    later.add(compute)
    return None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients) -> Tensor:
        # Not saved for the backward: under recompute that gives back copies, whose `grad` nobody reads.
        ctx.weight, ctx.bias, ctx.later = weight, bias, later
        ctx.save_for_backward(x)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), grad = ctx.saved_tensors, grads[0]
        leave_or_give(ctx.later, x, grad, ctx.weight, ctx.bias)
        return grad @ ctx.weight if ctx.needs_input_grad[0] else None, None, None, None


def linear(
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    later: WeightGradients | None = None,
) -> Float[Tensor, "*rows outputs"]:
    """Return x W^T + b. With `later` a backward leaves the gradients of W and b there."""
    if later is None:
        return functional.linear(x, weight, bias)
    return _untraced(x, weight, bias, later)


def _linear_with_queue(x: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients) -> Tensor:
    out: Tensor = _Linear.apply(x, weight, bias, later)  # type: ignore[no-untyped-call]
    return out


# Its backward fills the queue, which that of a compiled graph could not.
_untraced: Callable[..., Tensor] = torch.compiler.disable(_linear_with_queue)  # type: ignore[no-untyped-call]
