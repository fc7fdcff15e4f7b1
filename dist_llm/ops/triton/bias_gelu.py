"""y = gelu(x + b) in GELU's tanh form, computed in fp32; b may be absent.

dx = dy gelu'(x + b),  db = sum over rows of dx, in a fixed order (column_sum)
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dist_llm.ops.triton.column_sum import NUM_PARTS, column_sum
from dist_llm.ops.triton.gelu import gelu_gate, gelu_slope
from dist_llm.ops.triton.launch import (
    FLAT_BLOCK,
    FLAT_WARPS,
    check_alike,
    check_formats,
    check_vectors,
    on_device_of,
    rows_of,
)


@triton.jit
@no_type_check
def _forward(out, x_in, bias_in, width, BLOCK: tl.constexpr):
    """Move 2B an element (x in, y out): the least."""
    start = tl.program_id(0) * tl.cast(width, tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    x = tl.load(x_in + start + column, mask=here, other=0.0).to(tl.float32)
    if bias_in is not None:
        x += tl.load(bias_in + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + start + column, (x * gelu_gate(x)).to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def _backward(outputs, inputs, rows, width, BLOCK: tl.constexpr):
    """Move 3B an element (dy, x in, dx out): the least; 8 bytes x NUM_PARTS a column for db."""
    grad_x_out, parts_out = outputs
    grad_in, x_in, bias_in = inputs
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    stride = tl.cast(width, tl.int64)
    part = tl.zeros([BLOCK], tl.float32)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = index * stride
        x = tl.load(x_in + start + column, mask=here, other=0.0).to(tl.float32)
        if bias_in is not None:
            x += tl.load(bias_in + column, mask=here, other=0.0).to(tl.float32)
        grad_x = tl.load(grad_in + start + column, mask=here, other=0.0).to(tl.float32) * gelu_slope(x)
        part += grad_x
        tl.store(grad_x_out + start + column, grad_x.to(grad_x_out.dtype.element_ty), mask=here)
    if parts_out is not None:
        tl.store(parts_out + tl.program_id(0) * stride + column, part, mask=here)


def bias_gelu(x: Float[Tensor, "*rows width"], bias: Float[Tensor, " width"] | None) -> Float[Tensor, "*rows width"]:
    """Return gelu(x + bias), in x's format."""
    check_formats(x, bias)
    check_vectors(x, bias)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    if x.numel():
        with on_device_of(x):
            grid = (rows_of(x), triton.cdiv(width, FLAT_BLOCK))
            _forward[grid](out, x, bias, width, BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS)
    return out


def bias_gelu_backward(
    grad: Float[Tensor, "*rows width"], x: Float[Tensor, "*rows width"], bias: Float[Tensor, " width"] | None
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, " width"] | None]:
    """Return the gradients of x and bias, in their formats; None for no bias."""
    check_formats(grad, x, bias)
    check_alike(x, grad)
    check_vectors(x, bias)
    grad, x, bias = grad.contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    grad_x, rows, width = torch.empty_like(x), rows_of(x), x.shape[-1]
    programs = min(rows, NUM_PARTS)
    parts = None if bias is None else x.new_empty((programs, width), dtype=torch.float32)
    if x.numel():
        with on_device_of(x):
            grid = (programs, triton.cdiv(width, FLAT_BLOCK))
            _backward[grid]((grad_x, parts), (grad, x, bias), rows, width, BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS)
    return grad_x, None if parts is None or bias is None else column_sum(parts, bias.dtype)
