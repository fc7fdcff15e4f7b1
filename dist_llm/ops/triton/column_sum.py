"""out_j = sum over i of parts_ij: the second stage of the gradients of weights and biases, in a fixed order."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32
from torch import Tensor

from dist_llm.ops.triton.launch import on_device_of

NUM_PARTS = 256
"""Programs of a first stage: two for each multiprocessor of a Hopper GPU. Fixed, as is the order of sums by that."""
_ROWS, _COLUMNS = 32, 64


@triton.jit
@no_type_check
def _column_sum(out, parts, num_parts, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Move 4 bytes a part and B an output: the least."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_parts, ROWS):
        here = (start + row[:, None] < num_parts) & (column[None, :] < width)
        total += tl.load(parts + (start + row[:, None]).to(tl.int64) * width + column[None, :], mask=here, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


def column_sum(parts: Float32[Tensor, "parts width"], dtype: torch.dtype) -> Tensor:
    """Return the sum over rows [width], rounded once to a format."""
    num_parts, width = parts.shape
    out = parts.new_empty(width, dtype=dtype)
    if width:
        with on_device_of(parts):
            grid = (triton.cdiv(width, _COLUMNS),)
            _column_sum[grid](out, parts, num_parts, width, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)
    return out
