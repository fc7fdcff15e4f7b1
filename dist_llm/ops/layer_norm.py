"""LayerNorm (Ba et al. 2016): y = (x - mean) * rstd * w + b, rstd = rsqrt(var + eps), statistics in fp32 or wider.

    dx = (g - mean(g) - n * mean(g * n)) * rstd,   n = (x - mean) * rstd,   g = dy * w
With a residual the sum is normed, as rounded to the format of x; both are returned. Kernels: kernels/layer_norm.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dist_llm.ops import apex
from dist_llm.ops.autograd import call_op, dense_like, register_last, register_op, row_numbers
from dist_llm.ops.backends import APEX, TORCH, WITH_KERNELS, kernel

SCHEMAS = {
    "layer_norm": "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    "add_layer_norm": "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "layer_norm_backward": "(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
}


def layer_norm(
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    bias: Float[Tensor, " width"] | None,
    eps: float,
    backend: str = TORCH,
) -> Float[Tensor, "*rows width"]:
    """Normalise the last dim of x to mean 0 and variance 1, scale it by weight and add bias; result in x's format."""
    if backend in WITH_KERNELS:
        out: Tensor = call_op("layer_norm", backend, x, weight, bias, eps)[0]
        return out
    if backend == TORCH:
        return functional.layer_norm(x, weight.shape, weight, bias, eps)
    if backend == APEX:
        return apex.layer_norm(x, weight, bias, eps)
    out = _normed(x, eps)[0] * weight
    return (out if bias is None else out + bias).to(x.dtype)


def add_layer_norm(
    x: Float[Tensor, "*rows width"],
    residual: Float[Tensor, "*rows width"],
    scale: tuple[Float[Tensor, " width"], Float[Tensor, " width"] | None],
    eps: float,
    backend: str = TORCH,
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, "*rows width"]]:
    """Return the norm of x + residual, and that sum; both in x's format. scale: weight and bias."""
    if backend in WITH_KERNELS:
        normed, total, _, _ = call_op("add_layer_norm", backend, x, residual, *scale, eps)
        return normed, total
    total = x + residual
    return layer_norm(total, *scale, eps, backend), total


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the rows with mean 0 and variance 1, and 1 / their deviation; in fp32, or fp64 for that."""
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, of operations that can be differentiated again."""
    normed, rstd = _normed(x, eps)
    grad = grad.to(normed.dtype)
    scaled = grad * weight
    along = normed * (scaled * normed).mean(-1, keepdim=True)
    grad_x = (scaled - scaled.mean(-1, keepdim=True) - along) * rstd
    grad_weight = (grad * normed).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad.flatten(0, -2).sum(0).to(weight.dtype)


def _kernel_gradients(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight, mean, rstd = ctx.saved_tensors
    if grad is None:
        return grad_total, None, None
    if torch.is_grad_enabled():  # the gradient is itself differentiated: of operations that can be
        grad_x, grad_weight, grad_bias = _gradients(grad, x, weight, ctx.eps)
        return grad_x if grad_total is None else grad_x + grad_total, grad_weight, grad_bias
    out: tuple[Tensor, Tensor, Tensor] = kernel("layer_norm_backward", ctx.backend)(
        grad, grad_total, x, weight, mean, rstd
    )
    return out


def _keep_all(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, statistics: tuple[Tensor, ...]) -> None:
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(x, weight, *statistics)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps = inputs
    _keep_all(ctx, x, weight, bias, output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = _kernel_gradients(ctx, grad, None)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, ctx.eps = inputs
    _keep_all(ctx, output[1], weight, bias, output[2:])


def _backward_total(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = _kernel_gradients(ctx, grad, grad_total)
    return grad_x, grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


def register(backend: str) -> None:
    """Tell torch the shapes and gradients of a backend's overloads; once, when they are defined."""
    register_op(
        "layer_norm",
        backend,
        lambda x, weight, bias, eps: (dense_like(x), row_numbers(x), row_numbers(x)),
        _keep,
        _backward,
    )
    register_op(
        "add_layer_norm",
        backend,
        lambda x, residual, weight, bias, eps: (dense_like(x), dense_like(x), row_numbers(x), row_numbers(x)),
        _keep_total,
        _backward_total,
    )
    register_last(
        "layer_norm_backward",
        backend,
        lambda grad, more, x, weight, mean, rstd: (dense_like(x), dense_like(weight), dense_like(weight)),
    )
