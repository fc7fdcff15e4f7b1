"""RMSNorm (Zhang & Sennrich 2019): y = x * rsqrt(mean(x^2) + eps) * w, statistics in fp32 or wider.

A hand-written backward keeps one [rows] vector instead of the decomposed graph:
    dx = (dy*w - x * rstd^2 * mean(dy*w*x)) * rstd
With a residual the sum is normed, as rounded to the format of x; both are returned. Kernels: kernels/rms_norm.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dist_llm.ops import apex
from dist_llm.ops.autograd import call_op, dense_like, register_last, register_op, row_numbers
from dist_llm.ops.backends import APEX, REFERENCE, TORCH, WITH_KERNELS, kernel

SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    "rms_norm_backward": "(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
}


def _wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _rstd(x: Float[Tensor, "*rows width"], eps: float) -> Float[Tensor, "*rows 1"]:
    return torch.rsqrt(_wide(x).square().mean(-1, keepdim=True) + eps)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide, grad = _wide(x), _wide(grad)
    normed = wide * rstd
    scaled = grad * weight
    grad_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
    grad_weight = (grad * normed).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, rstd = _wide(x), _rstd(x, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, rstd)
        out = (wide * rstd) * weight
        # Compiled by torch 2.11, an output that went through a cast to its own format has wrong gradients.
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again: rstd is of x
            rstd = _rstd(x, ctx.eps)
        return *_gradients(grads[0], x, weight, rstd), None


def rms_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], eps: float, backend: str = REFERENCE
) -> Float[Tensor, "*rows width"]:
    """Normalise the last dim of x by its root mean square and scale it by weight; result in x's format."""
    out: Tensor
    if backend in WITH_KERNELS:
        out = call_op("rms_norm", backend, x, weight, eps)[0]
    elif backend == TORCH:
        # Its kernel is for weights of x's format; with others it would be many.
        out = functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    elif backend == APEX:
        out = apex.rms_norm(x, weight, eps)
    else:
        out = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def add_rms_norm(
    x: Float[Tensor, "*rows width"],
    residual: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    eps: float,
    backend: str = REFERENCE,
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, "*rows width"]]:
    """Return the norm of x + residual, and that sum; both in x's format."""
    if backend in WITH_KERNELS:
        normed, total, _ = call_op("add_rms_norm", backend, x, residual, weight, eps)
        return normed, total
    total = x + residual
    return rms_norm(total, weight, eps, backend), total


def _kernel_gradients(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    if grad is None:
        return grad_total, None
    if torch.is_grad_enabled():  # the gradient is itself differentiated: of operations that can be
        grad_x, grad_weight = _gradients(grad, x, weight, _rstd(x, ctx.eps))
        return grad_x if grad_total is None else grad_x + grad_total, grad_weight
    out: tuple[Tensor, Tensor] = kernel("rms_norm_backward", ctx.backend)(grad, grad_total, x, weight, rstd)
    return out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return *_kernel_gradients(ctx, grad, None), None


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(total, weight, rstd)


def _backward_total(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = _kernel_gradients(ctx, grad, grad_total)
    return grad_x, grad_x, grad_weight, None


def register(backend: str) -> None:
    """Tell torch the shapes and gradients of a backend's overloads; once, when they are defined."""
    register_op("rms_norm", backend, lambda x, weight, eps: (dense_like(x), row_numbers(x)), _keep, _backward)
    register_op(
        "add_rms_norm",
        backend,
        lambda x, residual, weight, eps: (dense_like(x), dense_like(x), row_numbers(x)),
        _keep_total,
        _backward_total,
    )
    register_last("rms_norm_backward", backend, lambda grad, more, x, weight, rstd: (dense_like(x), dense_like(weight)))
