"""LayerNorm (Ba et al. 2016), alone or of a sum with a residual; forward and backward are one pass each.

    y = n w + b,  n = (x - mean) rstd;    dx = (g - mean(g) - n mean(g n)) rstd (+ gradient of the sum),  g = dy w

A program holds a row in registers, so that the variance is of centred values. Backward, NUM_PARTS programs walk over
rows and keep their parts of dw and db. Sums are fp32; the sum with a residual is rounded to x's format first.
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
    out, total_out, mean_out, rstd_out = outputs
    x_in, residual_in, weight_in, bias_in = inputs
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
    mean = tl.sum(x, 0) / width
    centred = tl.where(here, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    y = centred * rstd * tl.load(weight_in + column, mask=here, other=0.0).to(tl.float32)
    if bias_in is not None:
        y += tl.load(bias_in + column, mask=here, other=0.0).to(tl.float32)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)
    tl.store(out + start + column, y.to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def _backward(outputs, grads, saved, rows, width, BLOCK: tl.constexpr):
    """Move 3B an element (dy, x in, dx out), 4B with the sum's gradient: the least; 16 bytes x NUM_PARTS a column."""
    grad_x_out, weight_parts_out, bias_parts_out = outputs
    grad_in, grad_total_in = grads
    x_in, weight_in, mean_in, rstd_in = saved
    column = tl.arange(0, BLOCK)
    here = column < width
    weight_part = tl.zeros([BLOCK], tl.float32)
    bias_part = tl.zeros([BLOCK], tl.float32)
    stride = tl.cast(width, tl.int64)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = index * stride
        grad = tl.load(grad_in + start + column, mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_in + index)
        x = tl.load(x_in + start + column, mask=here, other=0.0).to(tl.float32)
        normed = (x - tl.load(mean_in + index)) * rstd
        weight_part += grad * normed
        bias_part += grad
        # Read from the L1 cache at each row: held over the loop, it would spill the widest row's registers.
        scaled = grad * tl.load(weight_in + column, mask=here, other=0.0).to(tl.float32)
        along = tl.sum(scaled * normed, 0) / width
        grad_x = (scaled - tl.sum(scaled, 0) / width - normed * along) * rstd
        if grad_total_in is not None:
            grad_x += tl.load(grad_total_in + start + column, mask=here, other=0.0).to(tl.float32)
        tl.store(grad_x_out + start + column, grad_x.to(grad_x_out.dtype.element_ty), mask=here)
    tl.store(weight_parts_out + tl.program_id(0) * stride + column, weight_part, mask=here)
    tl.store(bias_parts_out + tl.program_id(0) * stride + column, bias_part, mask=here)


def layer_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], bias: Float[Tensor, " width"] | None, eps: float
) -> tuple[Float[Tensor, "*rows width"], Float32[Tensor, "*rows"], Float32[Tensor, "*rows"]]:
    """Return x normed, scaled and shifted, in x's format, and the mean and 1 / standard deviation of each row."""
    out, _, mean, rstd = _launch_forward(x, None, (weight, bias), eps)
    return out, mean, rstd


def add_layer_norm(
    x: Float[Tensor, "*rows width"],
    residual: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    bias: Float[Tensor, " width"] | None,
    eps: float,
) -> tuple[Tensor, Float[Tensor, "*rows width"], Float32[Tensor, "*rows"], Float32[Tensor, "*rows"]]:
    """Return the norm of x + residual, that sum, both in x's format, and mean and 1 / deviation of each of its rows."""
    return _launch_forward(x, residual, (weight, bias), eps)


def _launch_forward(
    x: Tensor, residual: Tensor | None, scale: tuple[Tensor, Tensor | None], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias = scale
    check_formats(x, residual, weight, bias)
    check_alike(x, residual)
    check_vectors(x, weight, bias)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    width = x.shape[-1]
    block, warps = row_block(width, WIDEST_NORM)
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))  # no views: results of an op
    total = x if residual is None else torch.empty_like(x)
    if x.numel():
        outputs = (out, total, mean, rstd)
        inputs = (x, residual, weight.contiguous(), None if bias is None else bias.contiguous())
        with on_device_of(x):
            _forward[(rows_of(x),)](outputs, inputs, eps, width, BLOCK=block, num_warps=warps)
    return out, total, mean, rstd


def layer_norm_backward(
    grad: Float[Tensor, "*rows width"],
    grad_total: Float[Tensor, "*rows width"] | None,
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    mean: Float32[Tensor, "*rows"],
    rstd: Float32[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, " width"], Float[Tensor, " width"]]:
    """Return the gradients of x, weight and bias, in the formats of x and weight; grad_total: of x as an output."""
    check_formats(grad, grad_total, x, weight)
    check_alike(x, grad, grad_total)
    check_vectors(x, weight)
    check_row_numbers(x, mean, rstd)
    x, grad = x.contiguous(), grad.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    rows, width = rows_of(x), x.shape[-1]
    block, warps = row_block(width, WIDEST_NORM)
    grad_x, parts = torch.empty_like(x), x.new_empty((2, min(rows, NUM_PARTS), width), dtype=torch.float32)
    if x.numel():
        outputs, saved = (grad_x, parts[0], parts[1]), (x, weight.contiguous(), mean.contiguous(), rstd.contiguous())
        with on_device_of(x):
            _backward[(parts.shape[1],)](outputs, (grad, grad_total), saved, rows, width, BLOCK=block, num_warps=warps)
    return grad_x, column_sum(parts[0], weight.dtype), column_sum(parts[1], weight.dtype)
