"""GELU (Hendrycks & Gimpel 2016) in its tanh form, with the sum with a bias before it.

    y = v sigmoid(2 u),   u = sqrt(2 / pi) (v + 0.044715 v^3),   v = x or x + bias
    dy/dv = s + v s (1 - s) (2 u)',   s = sigmoid(2 u)
Kernels: kernels/gelu.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.autograd import call_op, dense_like, register_last, register_op
from dist_llm.ops.backends import TORCH, WITH_KERNELS, kernel

SCHEMAS = {
    "gelu": "(Tensor x) -> Tensor",
    "bias_gelu": "(Tensor x, Tensor bias) -> Tensor",
    "gelu_backward": "(Tensor grad, Tensor x) -> Tensor",
    "bias_gelu_backward": "(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
}


def gelu(x: Float[Tensor, "*rows width"], backend: str = TORCH) -> Float[Tensor, "*rows width"]:
    """Return the tanh form of GELU, in x's format."""
    if backend in WITH_KERNELS:
        out: Tensor = call_op("gelu", backend, x)
        return out
    return _gelu(x, backend).to(x.dtype)


def _gelu(v: Tensor, backend: str) -> Tensor:
    if backend == TORCH:
        return functional.gelu(v, approximate="tanh")
    wide = v if v.dtype == torch.float64 else v.float()
    return wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))


def bias_gelu(
    x: Float[Tensor, "*rows width"], bias: Float[Tensor, " width"], backend: str = TORCH
) -> Float[Tensor, "*rows width"]:
    """Return the tanh form of GELU of x + bias, in x's format."""
    if backend in WITH_KERNELS:
        out: Tensor = call_op("bias_gelu", backend, x, bias)
        return out
    return _gelu(x + bias, backend).to(x.dtype)


def _slope(grad: Tensor, v: Tensor) -> Tensor:
    """Return the gradient of v, of operations that can be differentiated again."""
    out: Tensor = torch.ops.aten.gelu_backward(grad.to(v.dtype), v, approximate="tanh")
    return out


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
    (x,) = ctx.saved_tensors
    if grad is None:
        return None
    if torch.is_grad_enabled():  # the gradient is itself differentiated
        return _slope(grad, x)
    out: Tensor = kernel("gelu_backward", ctx.backend)(grad, x)
    return out


def _backward_bias(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    x, bias = ctx.saved_tensors
    if grad is None:
        return None, None
    if torch.is_grad_enabled():  # the gradient is itself differentiated
        grad_v = _slope(grad, x + bias)
        return grad_v.to(x.dtype), grad_v.flatten(0, -2).sum(0).to(bias.dtype)
    out: tuple[Tensor, Tensor] = kernel("bias_gelu_backward", ctx.backend)(grad, x, bias)
    return out


def register(backend: str) -> None:
    """Tell torch the shapes and gradients of a backend's overloads; once, when they are defined."""
    register_op("gelu", backend, dense_like, _keep, _backward)
    register_op("bias_gelu", backend, lambda x, bias: dense_like(x), _keep, _backward_bias)
    register_last("gelu_backward", backend, lambda grad, x: dense_like(x))
    register_last("bias_gelu_backward", backend, lambda grad, x, bias: (dense_like(x), dense_like(bias)))
