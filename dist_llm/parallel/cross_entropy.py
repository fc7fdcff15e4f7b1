"""Cross entropy over a vocabulary split on tp (Shoeybi et al. 2019, section 3), summed over counted tokens.

    loss = log sum_v exp(z_v - m) + m - z_target,   m = max_v z_v

The max and the two sums are reduced over tp, so no rank ever holds all logits. Columns at or past the real
vocabulary are padding: they are cut off before the max, get no gradient and are never predicted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from dist_llm.runtime.mesh import Axis
from dist_llm.types import IGNORE_INDEX


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, axis: Axis) -> Tensor:
        width = logits.shape[-1]
        start = axis.index * width
        valid = min(max(vocab_size - start, 0), width)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        counted = targets != IGNORE_INDEX
        local = targets - start
        here = counted & (local >= 0) & (local < valid)
        local = local.masked_fill(~here, 0)

        top = wide[..., :valid].amax(-1) if valid else wide.new_full(wide.shape[:-1], -torch.inf)
        if axis.size > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
        # Logits are not ours to write to; a wider copy of them is.
        shifted = wide - top[..., None] if wide.dtype == logits.dtype else wide.sub_(top[..., None])
        target = shifted.gather(-1, local[..., None])[..., 0].masked_fill(~here, 0.0)
        probabilities = shifted.exp_()
        probabilities[..., valid:] = 0.0
        sums = torch.stack((probabilities.sum(-1), target))
        if axis.size > 1:
            dist.all_reduce(sums, group=axis.group)
        losses = (sums[0].log() - sums[1]).masked_fill(~counted, 0.0)

        probabilities.div_(sums[0][..., None]).masked_fill_(~counted[..., None], 0.0)
        ctx.save_for_backward(probabilities, local, here)
        ctx.dtype = logits.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, here = ctx.saved_tensors
        probabilities.scatter_add_(-1, local[..., None], -here[..., None].to(probabilities.dtype))
        return probabilities.mul_(grads[0]).to(ctx.dtype), None, None, None


def cross_entropy_sum(
    logits: Float[Tensor, "batch seq columns"], targets: Int64[Tensor, "batch seq"], vocab_size: int, axis: Axis
) -> Float[Tensor, ""]:
    """Return the sum of token losses in nats (fp32 or fp64), equal on every tp rank.

    logits: this rank's columns, padding included; targets: IGNORE_INDEX where not counted. Issues two all-reduces over
    tp forward (max; sum and target), none backward. Backward may run once.
    """
    out: Tensor = _VocabParallelCrossEntropy.apply(logits, targets, vocab_size, axis)  # type: ignore[no-untyped-call]
    return out
