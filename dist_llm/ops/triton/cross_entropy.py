"""Cross entropy over a vocabulary split on ranks, whose gradient is written over the logits.

    loss = lse - (1 - s) z_target - s mean_v z + c lse^2,   lse = m + log sum_v exp(z_v - m)
    dz = p (1 + 2 c lse) - (1 - s) onehot - s / V           s: label smoothing, c: of the z-loss

One read gives a rank's maximum, sum of exp, target logit and sum of logits; ranks reduce these (maximum; sums, scaled
to the common maximum), then one read and write leave the gradient. Columns past the vocabulary's end get none, rows
without a target are not read.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dist_llm.ops.cross_entropy import Vocabulary
from dist_llm.ops.triton.launch import check_formats, on_device_of, warps_of
from dist_llm.types import IGNORE_INDEX

_BLOCK = 4096


@triton.jit
@no_type_check
def _statistics(outputs, logits, targets, columns, vocabulary, BLOCK: tl.constexpr):
    """Move B bytes a logit: the least. A row that is not counted is written alone."""
    top_out, sums_out = outputs
    begin, valid, ignored = vocabulary
    row, rows = tl.program_id(0), tl.num_programs(0)
    start = row * tl.cast(columns, tl.int64)
    lane = tl.arange(0, BLOCK)
    top = -float("inf")
    raised = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    wanted = tl.load(targets + row)
    used = tl.where(wanted != ignored, valid, 0)
    for first in range(0, used, BLOCK):
        here = first + lane < used
        z = tl.load(logits + start + first + lane, mask=here, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)  # so far nothing but -inf
        raised = raised * tl.exp(top - safe) + tl.exp(z - safe)
        plain += tl.where(here, z, 0.0)
        top = higher
    local = wanted - begin
    target = tl.load(logits + start + local, mask=(local >= 0) & (local < used), other=0.0).to(tl.float32)
    tl.store(top_out + row, tl.where(wanted != ignored, top, 0.0))
    tl.store(sums_out + row, tl.where(wanted != ignored, tl.sum(raised, 0), 1.0))
    tl.store(sums_out + rows + row, target)
    tl.store(sums_out + 2 * rows + row, tl.sum(plain, 0))


@triton.jit
@no_type_check
def _gradient(logits, inputs, columns, vocabulary, smoothing, z_loss, BLOCK: tl.constexpr):
    """Move 2B bytes a logit (in and out): the least. A row that is not counted is written alone."""
    targets, top_in, raised_in, grad_in, grad_stride = inputs
    begin, valid, size, ignored = vocabulary
    row = tl.program_id(0)
    start = row * tl.cast(columns, tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    top, raised = tl.load(top_in + row), tl.load(raised_in + row)
    grad = tl.load(grad_in + row * grad_stride)
    used = column < tl.where(target != ignored, valid, 0)
    z = tl.load(logits + start + column, mask=used, other=0.0).to(tl.float32)
    # Relative to the maximum, which may be large: its sum with the logarithm would lose digits.
    slope = tl.exp(z - top) / raised * (1.0 + 2.0 * z_loss * (top + tl.log(raised))) - smoothing / size
    slope = tl.where(column == target - begin, slope - (1.0 - smoothing), slope)
    slope = tl.where(used, slope * grad, 0.0)
    tl.store(logits + start + column, slope.to(logits.dtype.element_ty), mask=column < columns)


def _check(logits: Tensor, targets: Tensor, *of_rows: Tensor) -> None:
    """Raise TypeError or ValueError for tensors that would be read past their ends, or logits that have gaps."""
    check_formats(logits)
    if not logits.is_contiguous():
        raise ValueError(f"logits of strides {logits.stride()} must be contiguous: their gradient is written over them")
    for numbers, dtype in ((targets, torch.int64), *((numbers, torch.float32) for numbers in of_rows)):
        if numbers.shape != logits.shape[:1] or numbers.dtype != dtype:
            raise ValueError(f"needs a {dtype} for each of {len(logits)} rows, not {numbers.dtype} {[*numbers.shape]}")


def cross_entropy_statistics(
    logits: Float[Tensor, "rows columns"], targets: Int64[Tensor, " rows"], vocabulary: Vocabulary
) -> tuple[Float32[Tensor, " rows"], Float32[Tensor, "3 rows"]]:
    """Return of this rank's columns the maximum, and: sum of exp(z - maximum), target's logit or 0, sum of logits.

    Of a row that is not counted: 0, and 1, 0, 0.
    """
    _check(logits, targets)
    rows, columns = logits.shape
    top, sums = logits.new_empty(rows, dtype=torch.float32), logits.new_empty((3, rows), dtype=torch.float32)
    if rows:
        within = (vocabulary.start, min(vocabulary.valid, columns), IGNORE_INDEX)
        with on_device_of(logits):
            _statistics[(rows,)](
                (top, sums), logits, targets.contiguous(), columns, within, BLOCK=_BLOCK, num_warps=warps_of(_BLOCK)
            )
    return top, sums


def cross_entropy_gradient_(
    logits: Float[Tensor, "rows columns"],
    targets: Int64[Tensor, " rows"],
    grad: Float32[Tensor, " one_or_rows"],
    whole: tuple[Float32[Tensor, " rows"], Float32[Tensor, " rows"]],
    vocabulary: Vocabulary,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Write over the logits the gradient of each row's loss, times the row's `grad` (or the one number for all).

    whole: maximum and sum of exp relative to it, over the whole vocabulary.
    """
    rows, columns = logits.shape
    _check(logits, targets, *whole, grad.expand(rows) if grad.numel() == 1 else grad)
    if not rows or not columns:
        return
    within = (vocabulary.start, min(vocabulary.valid, columns), vocabulary.size, IGNORE_INDEX)
    top, raised = (numbers.contiguous() for numbers in whole)
    inputs = (targets.contiguous(), top, raised, grad.contiguous(), 0 if grad.numel() == 1 else 1)
    with on_device_of(logits):
        grid = (rows, triton.cdiv(columns, _BLOCK))
        _gradient[grid](logits, inputs, columns, within, smoothing, z_loss, BLOCK=_BLOCK, num_warps=warps_of(_BLOCK))
