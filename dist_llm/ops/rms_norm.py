"""RMSNorm (Zhang & Sennrich 2019): y = x * rsqrt(mean(x^2) + eps) * w, statistics in fp32 or wider.

A hand-written backward keeps one [rows] vector instead of the decomposed graph:
    dx = (dy*w - x * rstd^2 * mean(dy*w*x)) * rstd
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def _wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        out = (wide * rstd) * weight
        # Compiled by torch 2.11, an output that went through a cast to its own format has wrong gradients.
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        wide, grad = _wide(x), _wide(grads[0])
        normed = wide * rstd
        scaled = grad * weight
        grad_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*rows width"]:
    """Normalise the last dim of x by its root mean square and scale it by weight."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out
