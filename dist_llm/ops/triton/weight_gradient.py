"""dW <- dW + dy^T x with dW in fp32 and dy, x in bf16 or fp16: one product that adds where it writes.

Each program owns a tile of dW, walks over rows and adds its fp32 sum once, so nothing of dW's size is made besides and
the order of sums is fixed. Whether it beats cuBLAS with an fp32 output (ops/fused_accumulation.py) is unmeasured.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from dist_llm.ops.triton.launch import on_device_of

_OUTPUTS, _INPUTS, _ROWS = 128, 128, 32


@triton.jit
@no_type_check
def _accumulate(total, operands, sizes, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr):
    """Move 8 bytes an element of dW: the least; dy and x are read once for each tile that they share."""
    grad_in, x_in = operands
    rows, outputs, inputs = sizes
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    lane = tl.arange(0, ROWS)
    wide_outputs, wide_inputs = tl.cast(outputs, tl.int64), tl.cast(inputs, tl.int64)
    added = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + lane
        grad_here = (row < rows)[:, None] & (output < outputs)[None, :]
        grad = tl.load(grad_in + row[:, None] * wide_outputs + output[None, :], mask=grad_here, other=0.0)
        x_here = (row < rows)[:, None] & (column < inputs)[None, :]
        x = tl.load(x_in + row[:, None] * wide_inputs + column[None, :], mask=x_here, other=0.0)
        added = tl.dot(tl.trans(grad), x, added)
    place = total + output[:, None] * wide_inputs + column[None, :]
    here = (output < outputs)[:, None] & (column < inputs)[None, :]
    tl.store(place, tl.load(place, mask=here, other=0.0) + added, mask=here)


def add_weight_gradient(
    total: Float32[Tensor, "outputs inputs"], grad: Float[Tensor, "rows outputs"], x: Float[Tensor, "rows inputs"]
) -> None:
    """Add grad^T x to `total`, in place. Raises TypeError unless grad and x are both bf16 or both fp16."""
    if grad.dtype != x.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"grad and x must both be bf16 or both fp16, not {grad.dtype} and {x.dtype}")
    if not total.is_contiguous():
        raise ValueError(f"a gradient of strides {total.stride()} must be contiguous to be added to")
    outputs, inputs = total.shape
    if total.numel() and len(x):
        operands, sizes = (grad.contiguous(), x.contiguous()), (len(x), outputs, inputs)
        with on_device_of(total):
            grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(inputs, _INPUTS))
            _accumulate[grid](
                total, operands, sizes, OUTPUTS=_OUTPUTS, INPUTS=_INPUTS, ROWS=_ROWS, num_warps=8, num_stages=3
            )
