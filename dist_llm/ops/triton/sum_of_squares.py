"""sum over i of x_i^2 of a flat shard, for gradient norms: in two stages of a fixed order, without atomics.

A first stage of NUM_PARTS programs leaves fp32 parts; a single program adds them up. Ranks add their sums and take the
root; nothing waits for the host.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from dist_llm.ops.triton.column_sum import NUM_PARTS
from dist_llm.ops.triton.launch import FLAT_BLOCK, FLAT_WARPS, check_formats, on_device_of


@triton.jit
@no_type_check
def _parts(parts_out, x_in, count, BLOCK: tl.constexpr):
    """Move B bytes an element: the least."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    size = tl.cast(BLOCK, tl.int64)
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        place = block * size + lane
        x = tl.load(x_in + place, mask=place < count, other=0.0).to(tl.float32)
        total += x * x
    tl.store(parts_out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
@no_type_check
def _total(out, parts_in, num_parts, PARTS: tl.constexpr):
    """Move 4 bytes a part: the least."""
    lane = tl.arange(0, PARTS)
    tl.store(out, tl.sum(tl.load(parts_in + lane, mask=lane < num_parts, other=0.0), 0))


def sum_of_squares(x: Float[Tensor, " count"]) -> Float32[Tensor, ""]:
    """Return the sum of squares, on x's device; the same bit for bit each time."""
    check_formats(x)
    x, count = x.contiguous(), x.numel()
    out = x.new_zeros((), dtype=torch.float32)
    if count:
        parts = x.new_empty(min(NUM_PARTS, triton.cdiv(count, FLAT_BLOCK)), dtype=torch.float32)
        with on_device_of(x):
            _parts[(len(parts),)](parts, x, count, BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS)
            _total[(1,)](out, parts, len(parts), PARTS=triton.next_power_of_2(len(parts)), num_warps=1)
    return out
