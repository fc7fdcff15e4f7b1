"""Rotary embedding of q and k in one launch, in place or not, in the half-split form of ops/rope.py.

    [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin];    backward: by the opposite angle

A program rotates a few heads of a token, of q or of k, in fp32.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dist_llm.ops.triton.launch import check_formats, on_device_of

_PAIRS = 1024
"""Pairs of elements that a program of four warps rotates: 8 of each half a thread."""


@triton.jit
@no_type_check
def _rotate_heads(tensors, tables, head, strides, heads, half, HALF: tl.constexpr):
    out, x = tensors
    cos, sin = tables
    out_strides, x_strides = strides
    lane = tl.arange(0, HALF)[None, :]
    here = (head < heads)[:, None] & (lane < half)
    token = tl.program_id(0)
    first = x + token * tl.cast(x_strides[0], tl.int64) + head[:, None] * x_strides[1] + lane
    one = tl.load(first, mask=here, other=0.0).to(tl.float32)
    two = tl.load(first + half, mask=here, other=0.0).to(tl.float32)
    first_out = out + token * tl.cast(out_strides[0], tl.int64) + head[:, None] * out_strides[1] + lane
    tl.store(first_out, (one * cos - two * sin).to(out.dtype.element_ty), mask=here)
    tl.store(first_out + half, (two * cos + one * sin).to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def _rotate(pairs, tables, strides, sizes, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Move 2B an element (in and out): the least; the tables come from the L2 cache after a token's first program."""
    q, k = pairs
    cos_in, sin_in = tables
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


def _is_even(x: Tensor) -> bool:
    """Return whether tokens are evenly spaced and each head is dense."""
    batch, seq, heads, _ = x.shape
    return x.stride(3) == 1 and (batch == 1 or x.stride(0) == seq * x.stride(1)) and (heads == 1 or x.stride(2) != 0)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise TypeError or ValueError for tensors that would be read past their ends."""
    check_formats(q, k, cos, sin)
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or q.shape[3] % 2:
        raise ValueError(f"q and k must differ in heads alone, of an even size, not {[*q.shape]} and {[*k.shape]}")
    table = torch.Size((q.shape[1], q.shape[3] // 2))
    if cos.shape != table or sin.shape != table:
        raise ValueError(f"the table must be {[*table]}, not {[*cos.shape]} and {[*sin.shape]}")


def _launch(
    outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor], inverse: bool
) -> None:
    q, k = inputs
    batch, seq, q_heads, _ = q.shape
    k_heads, half = k.shape[2], table[0].shape[1]
    if not q.numel() and not k.numel():
        return
    block = triton.next_power_of_2(half)
    heads = max(1, min(_PAIRS // block, triton.next_power_of_2(max(q_heads, k_heads))))
    grid = (batch * seq, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))
    pairs = tuple(zip(outputs, inputs, strict=True))
    strides = tuple(tuple(x.stride()[1:3] for x in pair) for pair in pairs)
    tables, sizes = (table[0].contiguous(), table[1].contiguous()), (seq, half, q_heads, k_heads)
    with on_device_of(q):
        _rotate[grid](pairs, tables, strides, sizes, INVERSE=inverse, HEADS=heads, HALF=block, num_warps=4)


def rope(
    q: Float[Tensor, "batch seq q_heads head_dim"],
    k: Float[Tensor, "batch seq k_heads head_dim"],
    cos: Float[Tensor, "seq half"],
    sin: Float[Tensor, "seq half"],
    inverse: bool = False,
) -> tuple[Float[Tensor, "batch seq q_heads head_dim"], Float[Tensor, "batch seq k_heads head_dim"]]:
    """Return q and k rotated by the tables (half: head_dim / 2), by the opposite angle for `inverse`."""
    _check(q, k, cos, sin)
    inputs = q if _is_even(q) else q.contiguous(), k if _is_even(k) else k.contiguous()
    outputs = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(outputs, inputs, (cos, sin), inverse)
    return outputs


def rope_(
    q: Float[Tensor, "batch seq q_heads head_dim"],
    k: Float[Tensor, "batch seq k_heads head_dim"],
    cos: Float[Tensor, "seq half"],
    sin: Float[Tensor, "seq half"],
    inverse: bool = False,
) -> None:
    """Rotate q and k in place as `rope` does. Raises ValueError where tokens are not evenly spaced."""
    _check(q, k, cos, sin)
    for x, name in ((q, "q"), (k, "k")):
        if not _is_even(x):
            raise ValueError(
                f"{name} of strides {x.stride()} cannot be rotated in place: a token's heads must be dense rows"
            )
    _launch((q, k), (q, k), (cos, sin), inverse)
