"""Cross entropy over a vocabulary split on tp (Shoeybi et al. 2019, section 3), summed over counted tokens.

    loss = log sum_v exp(z_v - m) + m - z_target,   m = max_v z_v

The max and the two sums are reduced over tp, so no rank ever holds all logits. Columns at or past the real
vocabulary are padding: they are cut off before the max, get no gradient and are never predicted. The reference keeps
probabilities beside the logits; kernels (ops/cross_entropy.py) write the gradient over them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.backends import REFERENCE, TORCH, WITH_KERNELS
from dist_llm.ops.cross_entropy import Vocabulary, gradient_, local_statistics, token_losses
from dist_llm.runtime.mesh import Axis
from dist_llm.types import IGNORE_INDEX


def _part(logits: Tensor, vocab_size: int, axis: Axis) -> Vocabulary:
    width = logits.shape[-1]
    start = axis.index * width
    return Vocabulary(start, min(max(vocab_size - start, 0), width), vocab_size)


def _refuse_second_gradient() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError("cross_entropy_sum has no second gradient: its backward writes over what it kept")


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, axis: Axis) -> Tensor:
        part = _part(logits, vocab_size, axis)
        start, valid = part.start, part.valid
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

        # What is not counted is divided by infinity: a mask would cost another pass.
        probabilities.div_(sums[0].masked_fill(~counted, torch.inf)[..., None])
        ctx.save_for_backward(probabilities, local, here)
        ctx.dtype = logits.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        _refuse_second_gradient()
        probabilities, local, here = ctx.saved_tensors
        probabilities.scatter_add_(-1, local[..., None], -here[..., None].to(probabilities.dtype))
        return probabilities.mul_(grads[0]).to(ctx.dtype), None, None, None


class _InPlaceCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, part: Vocabulary, axis: Axis, backend: str) -> Tensor:
        rows, wanted = logits.detach().flatten(0, -2), targets.flatten()
        local, sums = local_statistics(rows, wanted, part, backend)
        top = local
        if axis.size > 1:
            top = local.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
            sums[0] *= torch.exp(local - top)
            dist.all_reduce(sums[:2], group=axis.group)
        ctx.part, ctx.backend = part, backend
        ctx.save_for_backward(logits, wanted, top, sums[0].clone())
        return token_losses(top, sums, part.size).masked_fill_(wanted == IGNORE_INDEX, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        _refuse_second_gradient()
        logits, wanted, top, raised = ctx.saved_tensors
        gradient = logits.detach()
        pull = grads[0].reshape(1)
        gradient_(gradient.flatten(0, -2), wanted, pull, (top, raised), ctx.part, backend=ctx.backend)
        return gradient, None, None, None, None


def _torch_cross_entropy_sum(logits: Tensor, targets: Tensor, vocab_size: int, axis: Axis) -> Tensor:
    if axis.size > 1:
        raise ValueError(f"torch's cross entropy needs the whole vocabulary, which {axis.size} ranks share")
    real = logits[..., :vocab_size].flatten(0, -2)
    wide = real if real.dtype == torch.float64 else real.float()
    return functional.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def cross_entropy_sum(
    logits: Float[Tensor, "batch seq columns"],
    targets: Int64[Tensor, "batch seq"],
    vocab_size: int,
    axis: Axis,
    backend: str = REFERENCE,
) -> Float[Tensor, ""]:
    """Return the sum of token losses in nats (fp32 or fp64), equal on every tp rank.

    logits: this rank's columns, padding included; with kernels the backward writes over them, unless they are a leaf or
    have gaps. targets: IGNORE_INDEX where not counted. Issues two all-reduces over tp forward (max; sum and target),
    none backward. Backward may run once, and cannot be differentiated; torch's can, of a vocabulary that is whole here:
    else it raises ValueError.
    """
    if backend == TORCH:
        return _torch_cross_entropy_sum(logits, targets, vocab_size, axis)
    out: Tensor
    if backend in WITH_KERNELS:
        is_a_leaf = torch.is_grad_enabled() and logits.requires_grad and logits.is_leaf
        if is_a_leaf or not logits.is_contiguous():
            logits = logits.clone(memory_format=torch.contiguous_format)
        out = _InPlaceCrossEntropy.apply(logits, targets, _part(logits, vocab_size, axis), axis, backend)  # type: ignore[no-untyped-call]
    else:
        out = _VocabParallelCrossEntropy.apply(logits, targets, vocab_size, axis)  # type: ignore[no-untyped-call]
    return out
