"""Rotary embedding of q and k in one launch, in place, in the half-split form of ops/rope.py.

    [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin];    backward: by the opposite angle, in place of the gradients

A program rotates a few heads of a token, of q or of k, in fp32.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dist_llm.ops.triton.launch import check_formats, on_device_of

_PAIRS = 1024
"""Pairs of elements that a program of four warps rotates: 8 of each half a thread."""


@triton.jit
@no_type_check
def _rotate_heads(x, tables, head, strides, heads, half, HALF: tl.constexpr):
    cos, sin = tables
    token_stride, head_stride = strides
    lane = tl.arange(0, HALF)[None, :]
    here = (head < heads)[:, None] & (lane < half)
    first = x + tl.program_id(0) * tl.cast(token_stride, tl.int64) + head[:, None] * head_stride + lane
    one = tl.load(first, mask=here, other=0.0).to(tl.float32)
    two = tl.load(first + half, mask=here, other=0.0).to(tl.float32)
    tl.store(first, (one * cos - two * sin).to(x.dtype.element_ty), mask=here)
    tl.store(first + half, (two * cos + one * sin).to(x.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def _rotate(tensors, strides, sizes, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Move 2B an element (in and out): the least; the tables come from the L2 cache after a token's first program."""
    q, k, cos_in, sin_in = tensors
    q_strides, k_strides = strides
    seq, half, q_heads, k_heads = sizes
    lane = tl.arange(0, HALF)[None, :]
    row = (tl.program_id(0) % seq) * half + lane
    cos = tl.load(cos_in + row, mask=lane < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + row, mask=lane < half, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    q_programs = tl.cdiv(q_heads, HEADS)
    block = tl.program_id(1)
    if block < q_programs:
        _rotate_heads(q, (cos, sin), block * HEADS + tl.arange(0, HEADS), q_strides, q_heads, half, HALF)
    else:
        head = (block - q_programs) * HEADS + tl.arange(0, HEADS)
        _rotate_heads(k, (cos, sin), head, k_strides, k_heads, half, HALF)


def _strides(x: Tensor, name: str) -> tuple[int, int]:
    """Return the strides of tokens and heads. Raises ValueError where tokens are not evenly spaced."""
    batch, seq, heads, _ = x.shape
    if x.stride(3) != 1 or (batch > 1 and x.stride(0) != seq * x.stride(1)) or (heads > 1 and x.stride(2) == 0):
        raise ValueError(
            f"{name} of strides {x.stride()} cannot be rotated in place: a token's heads must be dense rows"
        )
    return x.stride(1), x.stride(2)


def rope_(
    q: Float[Tensor, "batch seq q_heads head_dim"],
    k: Float[Tensor, "batch seq k_heads head_dim"],
    cos: Float[Tensor, "seq half"],
    sin: Float[Tensor, "seq half"],
    inverse: bool = False,
) -> None:
    """Rotate q and k in place by the tables (half: head_dim / 2), by the opposite angle for `inverse`."""
    check_formats(q, k, cos, sin)
    strides = _strides(q, "q"), _strides(k, "k")
    batch, seq, q_heads, _ = q.shape
    k_heads, half = k.shape[2], cos.shape[1]
    if not q.numel():
        return
    block = triton.next_power_of_2(half)
    heads = max(1, min(_PAIRS // block, triton.next_power_of_2(max(q_heads, k_heads))))
    grid = (batch * seq, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))
    tensors, sizes = (q, k, cos.contiguous(), sin.contiguous()), (seq, half, q_heads, k_heads)
    with on_device_of(q):
        _rotate[grid](tensors, strides, sizes, INVERSE=inverse, HEADS=heads, HALF=block, num_warps=4)
