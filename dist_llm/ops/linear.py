"""A linear map whose weight gradient can wait: y = x W^T + b; dx = dy W at once; dW = dy^T x and db when asked for.

What waits keeps x and dy alive. Source: Qi et al. 2023 (zero bubble): the two halves of a backward at different times.
Where a weight has a total of wider format, dW goes straight into that. On a CPU oneDNN may compute y and dx.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dist_llm.ops.backends import ONEDNN, REFERENCE
from dist_llm.ops.fused_accumulation import add_weight_gradient
from dist_llm.ops.registry import Kernels

SMALLEST_PRODUCT = 1 << 22
"""Multiplications below which oneDNN's call costs more than it gains."""

Totals = Callable[[Tensor], Tensor | None]
"""From a weight to the fp32 total of its gradients, or None where they go to its `grad`."""


class WeightGradients:
    """Where the weight gradients of a stage are computed: later, in the order in which they came, or at once."""

    def __init__(self, totals: Totals | None = None, waits: bool = True) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._totals, self._waits = totals, waits

    def add(self, compute: Callable[[], None]) -> None:
        """Let a gradient wait, or not; `compute` adds it to its weight's `grad`."""
        if self._waits:
            self._waiting.append(compute)
        else:
            compute()

    def take(self) -> Callable[[], None]:
        """Return what computes all that waits, in the order in which it came, and let go of it."""
        waiting, self._waiting = self._waiting, []

        @torch.no_grad()
        def compute_all() -> None:
            while waiting:
                waiting.pop(0)()

        return compute_all

    def add_product(self, weight: Tensor, grad: Tensor, x: Tensor) -> None:
        """Add grad^T x to the total of a weight, or to its `grad`."""
        total = None if self._totals is None else self._totals(weight)
        if total is None:
            accumulate(weight, grad.t() @ x)
        else:
            add_weight_gradient(total, grad, x)


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add a gradient to its parameter's `grad`, or let it be that, in the format in which the parameter keeps it."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.grad_dtype or gradient.dtype)
    else:
        parameter.grad.add_(gradient)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def leave_or_give(
    later: WeightGradients | None,
    x: Float[Tensor, "*rows inputs"],
    grad: Float[Tensor, "*rows outputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of W and b from those of the output; with `later` leave them there and return none."""

    # Detached: what waits must keep no graph alive.
    inputs = x.detach()

    def compute() -> None:
        if later is not None:
            later.add_product(weight, _rows(grad), _rows(inputs))
        if bias is not None:
            accumulate(bias, _rows(grad).sum(dim=0))

    if later is None:
        return _rows(grad).t() @ _rows(inputs), None if bias is None else _rows(grad).sum(dim=0)
    later.add(compute)
    return None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients, backend: str
    ) -> Tensor:
        # Not saved for the backward: under recompute that gives back copies, whose `grad` nobody reads.
        ctx.weight, ctx.bias, ctx.later, ctx.backend = weight, bias, later, backend
        ctx.save_for_backward(x)
        return product(x, weight, bias, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        leave_or_give(ctx.later, ctx.saved_tensors[0], grads[0], ctx.weight, ctx.bias)
        grad_x = product(grads[0], ctx.weight.t(), None, ctx.backend) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias, ONEDNN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        grad_x = None
        if ctx.needs_input_grad[0]:  # differentiated again: of operations that can be
            grad_x = grad @ weight if torch.is_grad_enabled() else product(grad, weight.t(), None, ONEDNN)
        grad_weight = _rows(grad).t() @ _rows(x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, _rows(grad).sum(dim=0) if ctx.needs_input_grad[2] else None


def product(
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    backend: str = REFERENCE,
) -> Float[Tensor, "*rows outputs"]:
    """Return x W^T + b; onednn: without a gradient, and where the product is large enough to be worth its call."""
    if backend == ONEDNN and x.numel() * weight.shape[0] >= SMALLEST_PRODUCT:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return functional.linear(x, weight, bias)


def linear(
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    later: WeightGradients | None = None,
    backend: str = REFERENCE,
) -> Float[Tensor, "*rows outputs"]:
    """Return x W^T + b. With `later` a backward leaves the gradients of W and b there."""
    if later is not None:
        return _untraced(x, weight, bias, later, backend)
    if backend == REFERENCE or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    out: Tensor = _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _linear_with_queue(x: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients, backend: str) -> Tensor:
    out: Tensor = _Linear.apply(x, weight, bias, later, backend)  # type: ignore[no-untyped-call]
    return out


# Its backward fills the queue, which that of a compiled graph could not.
_untraced: Callable[..., Tensor] = torch.compiler.disable(_linear_with_queue)  # type: ignore[no-untyped-call]


class Linear(nn.Linear):
    """torch's linear layer with a choice of what multiplies, whose weight gradient can wait."""

    kernels = Kernels()
    later: WeightGradients | None = None

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Map x."""
        return linear(x, self.weight, self.bias, self.later, self.kernels.linear)
