"""SwiGLU (Shazeer 2020): y = silu(gate) * up, silu(g) = g s, s = sigmoid(g).

    dgate = dy up (s + g s (1 - s)),   dup = dy g s
Its backward makes silu(gate) again, so that gate and up alone are kept. Kernels: kernels/swiglu.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.autograd import call_op, dense_like, register_last, register_op
from dist_llm.ops.backends import REFERENCE, WITH_KERNELS, kernel

SCHEMAS = {
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward": "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
}


def _gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        share = gate.sigmoid()
        return grad * up * (share + gate * share * (1 - share)), grad * gate * share
    return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(grads[0], *ctx.saved_tensors)


def swiglu(
    gate: Float[Tensor, "*rows width"], up: Float[Tensor, "*rows width"], backend: str = REFERENCE
) -> Float[Tensor, "*rows width"]:
    """Return silu(gate) * up."""
    out: Tensor
    if backend in WITH_KERNELS:
        out = call_op("swiglu", backend, gate, up)
    else:
        out = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    gate, up = ctx.saved_tensors
    if grad is None:
        return None, None
    if torch.is_grad_enabled():  # the gradient is itself differentiated
        return _gradients(grad, gate, up)
    out: tuple[Tensor, Tensor] = kernel("swiglu_backward", ctx.backend)(grad, gate, up)
    return out


def register(backend: str) -> None:
    """Tell torch the shapes and gradients of a backend's overloads; once, when they are defined."""
    register_op("swiglu", backend, lambda gate, up: dense_like(gate), _keep, _backward)
    register_last("swiglu_backward", backend, lambda grad, gate, up: (dense_like(gate), dense_like(up)))
