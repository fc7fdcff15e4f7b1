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

from dist_llm.ops.autograd import call_op, dense_like, register_last, register_op, row_numbers

NATIVE_OPS = ("layer_norm", "add_layer_norm", "layer_norm_backward")


def layer_norm(
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    bias: Float[Tensor, " width"] | None,
    eps: float,
    backend: str = "reference",
) -> Float[Tensor, "*rows width"]:
    """Normalise the last dim of x to mean 0 and variance 1, scale it by weight and add bias; result in x's format."""
    if backend == "native":
        out: Tensor = call_op("layer_norm", x, weight, bias, eps)[0]
        return out
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Float[Tensor, "*rows width"],
    residual: Float[Tensor, "*rows width"],
    scale: tuple[Float[Tensor, " width"], Float[Tensor, " width"] | None],
    eps: float,
    backend: str = "reference",
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, "*rows width"]]:
    """Return the norm of x + residual, and that sum; both in x's format. scale: weight and bias."""
    if backend == "native":
        normed, total, _, _ = call_op("add_layer_norm", x, residual, *scale, eps)
        return normed, total
    total = x + residual
    return layer_norm(total, *scale, eps), total


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, of operations that can be differentiated again."""
    wide, grad = x.float(), grad.float()
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed, scaled = centred * rstd, grad * weight
    along = normed * (scaled * normed).mean(-1, keepdim=True)
    grad_x = (scaled - scaled.mean(-1, keepdim=True) - along) * rstd
    grad_weight = (grad * normed).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad.flatten(0, -2).sum(0).to(weight.dtype)


_Saved = tuple[Tensor, Tensor, Tensor, Tensor]
"""What is normed, the weight, and mean and rstd of the rows."""


def _native_gradients(
    grad: Tensor | None, grad_total: Tensor | None, saved: _Saved, eps: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad is None:
        return grad_total, None, None
    if torch.is_grad_enabled():  # the gradient is itself differentiated: of operations that can be
        x, weight, _, _ = saved
        grad_x, grad_weight, grad_bias = _gradients(grad, x, weight, eps)
        return grad_x if grad_total is None else grad_x + grad_total, grad_weight, grad_bias
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.dist_llm.layer_norm_backward(grad, grad_total, *saved)
    return out


def _keep_all(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, statistics: tuple[Tensor, ...]) -> None:
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(x, weight, *statistics)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps = inputs
    _keep_all(ctx, x, weight, bias, output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = _native_gradients(grad, None, ctx.saved_tensors, ctx.eps)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, ctx.eps = inputs
    _keep_all(ctx, output[1], weight, bias, output[2:])


def _backward_total(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = _native_gradients(grad, grad_total, ctx.saved_tensors, ctx.eps)
    return grad_x, grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


def register_native() -> None:
    """Tell torch the shapes and gradients of the library's ops; once, after it was loaded."""
    register_op(
        "layer_norm",
        lambda x, weight, bias, eps: (dense_like(x), row_numbers(x), row_numbers(x)),
        _keep,
        _backward,
    )
    register_op(
        "add_layer_norm",
        lambda x, residual, weight, bias, eps: (dense_like(x), dense_like(x), row_numbers(x), row_numbers(x)),
        _keep_total,
        _backward_total,
    )
    register_last(
        "layer_norm_backward",
        lambda grad, more, x, weight, mean, rstd: (dense_like(x), dense_like(weight), dense_like(weight)),
    )
