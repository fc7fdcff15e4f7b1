"""RMSNorm (Zhang & Sennrich 2019), alone or of a sum with a residual; forward and backward are one pass each.

    y = x rstd w,  rstd = rsqrt(mean(x^2) + eps);    dx = (dy w - x rstd^2 mean(dy w x)) rstd (+ gradient of the sum)

A program holds a row in registers. Backward, NUM_PARTS programs walk over rows and keep their part of dw, so that its
order of summation is fixed. Sums are fp32; the sum with a residual is rounded to x's format before it is normed.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from dist_llm.ops.triton.column_sum import NUM_PARTS, column_sum
from dist_llm.ops.triton.launch import (
    WIDEST_NORM,
    check_alike,
    check_formats,
    check_row_numbers,
    check_vectors,
    on_device_of,
    row_block,
    rows_of,
)


@triton.jit
@no_type_check
def _forward(outputs, inputs, eps, width, BLOCK: tl.constexpr):
    """Move 2B an element (x in, y out) or 4B with a residual (both in, sum and y out): the least."""
    out, total_out, rstd_out = outputs
    x_in, residual_in, weight_in = inputs
    row = tl.program_id(0)
    start = row * tl.cast(width, tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < width
    x = tl.load(x_in + start + column, mask=here, other=0.0).to(tl.float32)
    if residual_in is not None:
        x += tl.load(residual_in + start + column, mask=here, other=0.0).to(tl.float32)
        rounded = x.to(total_out.dtype.element_ty)
        tl.store(total_out + start + column, rounded, mask=here)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_in + column, mask=here, other=0.0).to(tl.float32)
    tl.store(rstd_out + row, rstd)
    tl.store(out + start + column, (x * rstd * weight).to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def _backward(outputs, grads, saved, rows, width, BLOCK: tl.constexpr):
    """Move 3B an element (dy, x in, dx out), 4B with the sum's gradient: the least; 8 bytes x NUM_PARTS a column."""
    grad_x_out, parts_out = outputs
    grad_in, grad_total_in = grads
    x_in, weight_in, rstd_in = saved
    column = tl.arange(0, BLOCK)
    here = column < width
    part = tl.zeros([BLOCK], tl.float32)
    stride = tl.cast(width, tl.int64)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = index * stride
        grad = tl.load(grad_in + start + column, mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_in + index)
        normed = tl.load(x_in + start + column, mask=here, other=0.0).to(tl.float32) * rstd
        part += grad * normed
        # Read from the L1 cache at each row: held over the loop, it would spill the widest row's registers.
        scaled = grad * tl.load(weight_in + column, mask=here, other=0.0).to(tl.float32)
        grad_x = (scaled - normed * (tl.sum(scaled * normed, 0) / width)) * rstd
        if grad_total_in is not None:
            grad_x += tl.load(grad_total_in + start + column, mask=here, other=0.0).to(tl.float32)
        tl.store(grad_x_out + start + column, grad_x.to(grad_x_out.dtype.element_ty), mask=here)
    tl.store(parts_out + tl.program_id(0) * stride + column, part, mask=here)


def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_formats(x, residual, weight)
    check_alike(x, residual)
    check_vectors(x, weight)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    width = x.shape[-1]
    block, warps = row_block(width, WIDEST_NORM)
    out, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x if residual is None else torch.empty_like(x)
    if x.numel():
        outputs, inputs = (out, total, rstd), (x, residual, weight.contiguous())
        with on_device_of(x):
            _forward[(rows_of(x),)](outputs, inputs, eps, width, BLOCK=block, num_warps=warps)
    return out, total, rstd


def rms_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], eps: float
) -> tuple[Float[Tensor, "*rows width"], Float32[Tensor, "*rows"]]:
    """Return x normed and scaled, in x's format, and 1 / rms of each row."""
    out, _, rstd = _launch_forward(x, None, weight, eps)
    return out, rstd


def add_rms_norm(
    x: Float[Tensor, "*rows width"],
    residual: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    eps: float,
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, "*rows width"], Float32[Tensor, "*rows"]]:
    """Return the norm of x + residual, that sum, both in x's format, and 1 / rms of each of its rows."""
    return _launch_forward(x, residual, weight, eps)


def rms_norm_backward(
    grad: Float[Tensor, "*rows width"],
    grad_total: Float[Tensor, "*rows width"] | None,
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    rstd: Float32[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, " width"]]:
    """Return the gradients of x and weight, in their formats; x: what was normed, grad_total: of it as an output."""
    check_formats(grad, grad_total, x, weight)
    check_alike(x, grad, grad_total)
    check_vectors(x, weight)
    check_row_numbers(x, rstd)
    x, grad = x.contiguous(), grad.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    rows, width = rows_of(x), x.shape[-1]
    block, warps = row_block(width, WIDEST_NORM)
    grad_x, parts = torch.empty_like(x), x.new_empty((min(rows, NUM_PARTS), width), dtype=torch.float32)
    if x.numel():
        grads, saved = (grad, grad_total), (x, weight.contiguous(), rstd.contiguous())
        with on_device_of(x):
            _backward[(len(parts),)]((grad_x, parts), grads, saved, rows, width, BLOCK=block, num_warps=warps)
    return grad_x, column_sum(parts, weight.dtype)
