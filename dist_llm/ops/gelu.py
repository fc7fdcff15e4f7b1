"""GELU (Hendrycks & Gimpel 2016) in its tanh form, with the sum with a bias before it.

    y = v sigmoid(2 u),   u = sqrt(2 / pi) (v + 0.044715 v^3),   v = x or x + bias
    dy/dv = s + v s (1 - s) (2 u)',   s = sigmoid(2 u)
Kernels: kernels/gelu.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.autograd import call_op, dense_like, register_last, register_op

NATIVE_OPS = ("gelu", "bias_gelu", "gelu_backward", "bias_gelu_backward")


def gelu(x: Float[Tensor, "*rows width"], backend: str = "reference") -> Float[Tensor, "*rows width"]:
    """Return the tanh form of GELU, in x's format."""
    if backend == "native":
        out: Tensor = call_op("gelu", x)
        return out
    return functional.gelu(x, approximate="tanh")


def bias_gelu(
    x: Float[Tensor, "*rows width"], bias: Float[Tensor, " width"], backend: str = "reference"
) -> Float[Tensor, "*rows width"]:
    """Return the tanh form of GELU of x + bias, in x's format."""
    if backend == "native":
        out: Tensor = call_op("bias_gelu", x, bias)
        return out
    return functional.gelu(x + bias, approximate="tanh").to(x.dtype)


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
    out: Tensor = torch.ops.dist_llm.gelu_backward(grad, x)
    return out


def _backward_bias(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    x, bias = ctx.saved_tensors
    if grad is None:
        return None, None
    if torch.is_grad_enabled():  # the gradient is itself differentiated
        grad_v = _slope(grad, x + bias)
        return grad_v.to(x.dtype), grad_v.flatten(0, -2).sum(0).to(bias.dtype)
    out: tuple[Tensor, Tensor] = torch.ops.dist_llm.bias_gelu_backward(grad, x, bias)
    return out


def register_native() -> None:
    """Tell torch the shapes and gradients of the library's ops; once, after it was loaded."""
    register_op("gelu", dense_like, _keep, _backward)
    register_op("bias_gelu", lambda x, bias: dense_like(x), _keep, _backward_bias)
    register_last("gelu_backward", lambda grad, x: dense_like(x))
    register_last("bias_gelu_backward", lambda grad, x, bias: (dense_like(x), dense_like(bias)))
