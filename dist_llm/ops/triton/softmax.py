"""Scaled masked softmax, as attention without a flash kernel needs it: p = softmax(scale x) over what may be attended.

    dx = scale p (dp - sum(dp p))

A query sees keys up to its own place (causal), those that a mask marks True, as scaled_dot_product_attention has it,
or both. What it does not see is 0; a row that sees nothing is 0 throughout. fp32 inside, a row in registers.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from dist_llm.ops.triton.launch import check_formats, on_device_of, row_block


@triton.jit
@no_type_check
def _forward(tensors, mask_strides, sizes, scale, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Move 2B an element (x in, p out), 1 byte more with a mask: the least. Causal, half of x is not read."""
    out, x_in, mask_in = tensors
    heads, queries, keys = sizes
    row = tl.program_id(0)
    query = row % queries
    start = row * tl.cast(keys, tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < keys
    seen = here
    if CAUSAL:
        # Read in sixteens: a mask that ends anywhere would make every load a scalar one.
        last = query + keys - queries
        here = here & (column < (last // 16 + 1) * 16)
        seen = here & (column <= last)
    if mask_in is not None:
        of_batch, of_head, of_query = mask_strides
        sample, head = row // (heads * queries), (row // queries) % heads
        mask_row = sample * tl.cast(of_batch, tl.int64) + head * tl.cast(of_head, tl.int64) + query * of_query
        seen = seen & (tl.load(mask_in + mask_row + column, mask=here, other=0) != 0)
    x = tl.where(seen, tl.load(x_in + start + column, mask=here, other=0.0).to(tl.float32) * scale, -float("inf"))
    top = tl.max(x, 0)
    raised = tl.where(seen, tl.exp(x - tl.where(top == -float("inf"), 0.0, top)), 0.0)
    total = tl.sum(raised, 0)
    tl.store(
        out + start + column, (raised / tl.where(total == 0.0, 1.0, total)).to(out.dtype.element_ty), mask=column < keys
    )


@triton.jit
@no_type_check
def _backward(grad_x_out, grad_in, out_in, keys, scale, BLOCK: tl.constexpr):
    """Move 3B an element (dp, p in, dx out): the least."""
    start = tl.program_id(0) * tl.cast(keys, tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < keys
    grad = tl.load(grad_in + start + column, mask=here, other=0.0).to(tl.float32)
    out = tl.load(out_in + start + column, mask=here, other=0.0).to(tl.float32)
    grad_x = scale * out * (grad - tl.sum(grad * out, 0))
    tl.store(grad_x_out + start + column, grad_x.to(grad_x_out.dtype.element_ty), mask=here)


def scaled_masked_softmax(
    x: Float[Tensor, "batch heads queries keys"],
    mask: Bool[Tensor, "#batch #heads queries keys"] | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "batch heads queries keys"]:
    """Return the softmax over keys, in x's format; mask: True where attended, of size 1 where it is shared."""
    check_formats(x)
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, heads, queries, keys = x.shape
    strides = None
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8).expand(batch, heads, queries, keys)
        strides = mask.stride()[:3]
    if x.numel():
        block, warps = row_block(keys)
        tensors, sizes = (out, x, mask), (heads, queries, keys)
        with on_device_of(x):
            grid = (batch * heads * queries,)
            _forward[grid](tensors, strides, sizes, scale, CAUSAL=causal, BLOCK=block, num_warps=warps)
    return out


def scaled_masked_softmax_backward(
    grad: Float[Tensor, "batch heads queries keys"], out: Float[Tensor, "batch heads queries keys"], scale: float
) -> Float[Tensor, "batch heads queries keys"]:
    """Return the gradient of x; out: what forward returned."""
    check_formats(grad, out)
    grad, out = grad.contiguous(), out.contiguous()
    grad_x, keys = torch.empty_like(out), out.shape[-1]
    if out.numel():
        block, warps = row_block(keys)
        with on_device_of(out):
            _backward[(out.numel() // keys,)](grad_x, grad, out, keys, scale, BLOCK=block, num_warps=warps)
    return grad_x
