"""Rows of tokens to the order of experts and back, by gathers alone, so that no gradient needs atomics.

    permute:    y_r = x_(row_r // k);                 dx_t = sum over j of dy_(place_tj)
    unpermute:  y_t = sum over j of w_tj x_(place_tj); dx_r = w_r dy_(row_r // k),  dw_r = dy_(row_r // k) . x_r

row_r is the choice (token k + j) that sorted row r holds, place_tj the row of choice j of token t, -1 where an expert's
capacity dropped it. A program handles a token or a row, in fp32, in pieces of BLOCK columns.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dist_llm.ops.triton.launch import FLAT_BLOCK, FLAT_WARPS, check_formats, on_device_of


@triton.jit
@no_type_check
def _gather(out, x_in, rows, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Move 2B an element of the result (in and out): the least but for tokens that caches hold for their k rows."""
    stride = tl.cast(width, tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(rows + tl.program_id(0)) // TOP_K
    x = tl.load(x_in + token * stride + column, mask=column < width)
    tl.store(out + tl.program_id(0) * stride + column, x, mask=column < width)


@triton.jit
@no_type_check
def _combine(out, x_in, weights, places, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Move B an element of x and of the result: the least."""
    stride = tl.cast(width, tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(TOP_K):
        place = tl.load(places + tl.program_id(0) * TOP_K + choice)
        here = column < tl.where(place >= 0, width, 0)
        x = tl.load(x_in + place * stride + column, mask=here, other=0.0).to(tl.float32)
        if weights is not None:
            x *= tl.load(weights + tl.program_id(0) * TOP_K + choice)
        total += x
    tl.store(out + tl.program_id(0) * stride + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
@no_type_check
def _spread(outputs, inputs, rows, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Move 3B an element of x (dy, x in, dx out): the least but for tokens that caches hold for their k rows."""
    grad_x_out, grad_weights_out = outputs
    grad_in, x_in, weights = inputs
    stride = tl.cast(width, tl.int64)
    lane = tl.arange(0, BLOCK)
    choice = tl.load(rows + tl.program_id(0)).to(tl.int32)
    grad_row = grad_in + choice // TOP_K * stride
    x_row, grad_x_row = x_in + tl.program_id(0) * stride, grad_x_out + tl.program_id(0) * stride
    weight = tl.load(weights + choice)
    dot = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        grad = tl.load(grad_row + column, mask=column < width, other=0.0).to(tl.float32)
        dot += grad * tl.load(x_row + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(grad_x_row + column, (grad * weight).to(grad_x_out.dtype.element_ty), mask=column < width)
    tl.store(grad_weights_out + choice, tl.sum(dot, 0))


def moe_permute(
    x: Float[Tensor, "tokens width"], rows: Int64[Tensor, " rows"], top_k: int
) -> Float[Tensor, "rows width"]:
    """Return the tokens in the order of experts; rows: choices (token * top_k + j) sorted by expert."""
    check_formats(x)
    x, width = x.contiguous(), x.shape[1]
    out = x.new_empty((len(rows), width))
    if out.numel():
        with on_device_of(x):
            grid = (len(rows), triton.cdiv(width, FLAT_BLOCK))
            _gather[grid](out, x, rows.contiguous(), width, TOP_K=top_k, BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS)
    return out


def _launch_combine(x: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    check_formats(x)
    (tokens, top_k), width = places.shape, x.shape[1]
    out = x.new_empty((tokens, width))
    if out.numel():
        weights = None if weights is None else weights.contiguous()
        with on_device_of(x):
            grid = (tokens, triton.cdiv(width, FLAT_BLOCK))
            _combine[grid](
                out, x.contiguous(), weights, places.contiguous(), width, TOP_K=top_k, BLOCK=FLAT_BLOCK, num_warps=4
            )
    return out


def moe_permute_backward(
    grad: Float[Tensor, "rows width"], places: Int64[Tensor, "tokens top_k"]
) -> Float[Tensor, "tokens width"]:
    """Return the gradient of the tokens: the sum of each one's rows; places: their rows, -1 for none."""
    return _launch_combine(grad, None, places)


def moe_unpermute(
    x: Float[Tensor, "rows width"], weights: Float32[Tensor, "tokens top_k"], places: Int64[Tensor, "tokens top_k"]
) -> Float[Tensor, "tokens width"]:
    """Return for each token the weighted sum of its rows, rounded once; places: its rows, -1 for none."""
    return _launch_combine(x, weights, places)


def moe_unpermute_backward(
    grad: Float[Tensor, "tokens width"],
    x: Float[Tensor, "rows width"],
    weights: Float32[Tensor, "tokens top_k"],
    rows: Int64[Tensor, " rows"],
) -> tuple[Float[Tensor, "rows width"], Float32[Tensor, "tokens top_k"]]:
    """Return the gradients of x and of the weights, 0 for dropped choices; rows: as in moe_permute."""
    check_formats(grad, x)
    grad, x, top_k, width = grad.contiguous(), x.contiguous(), weights.shape[1], x.shape[1]
    outputs = torch.empty_like(x), torch.zeros_like(weights, memory_format=torch.contiguous_format)
    if x.numel():
        with on_device_of(x):
            inputs = (grad, x, weights.contiguous())
            _spread[(len(rows),)](
                outputs, inputs, rows.contiguous(), width, TOP_K=top_k, BLOCK=FLAT_BLOCK, num_warps=2 * FLAT_WARPS
            )
    return outputs
