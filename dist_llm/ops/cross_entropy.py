"""Cross entropy over one rank's part of a vocabulary, in two passes between which ranks reduce.

    loss = lse - (1 - s) z_target - s mean_v z + c lse^2,   lse = top + log raised,   raised = sum_v exp(z_v - top)
    dz = p (1 + 2 c lse) - (1 - s) onehot - s / V           s: label smoothing, c: of the z-loss

The first pass reads the logits once; the second writes their gradient over them, so that nothing else of their size
lives. parallel/cross_entropy.py has the collectives, and the reference in PyTorch. Kernels: kernels/cross_entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dist_llm.ops.autograd import register_op
from dist_llm.types import IGNORE_INDEX

NATIVE_OPS = ("cross_entropy_statistics", "cross_entropy_gradient_")


@dataclass(frozen=True)
class Vocabulary:
    """A rank's columns: the first one's place in the vocabulary, and how many of them belong to it; `size` in all."""

    start: int
    valid: int
    size: int


def native_statistics(
    logits: Float[Tensor, "rows columns"], targets: Int64[Tensor, " rows"], vocabulary: Vocabulary
) -> tuple[Float32[Tensor, " rows"], Float32[Tensor, "3 rows"]]:
    """Return of this rank's columns the maximum, and: sum of exp(z - maximum), target's logit or 0, sum of logits.

    Of a row that is not counted: 0, and 1, 0, 0. Logits must be contiguous.
    """
    part = (vocabulary.start, vocabulary.valid, IGNORE_INDEX)
    out: tuple[Tensor, Tensor] = torch.ops.dist_llm.cross_entropy_statistics(logits, targets, *part)
    return out


def token_losses(
    top: Float32[Tensor, " rows"],
    sums: Float32[Tensor, "numbers rows"],
    size: int,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float32[Tensor, " rows"]:
    """Return each row's loss in nats from its statistics over the whole vocabulary of `size` tokens.

    sums: as `native_statistics` gives them, relative to `top`; the third is read only for smoothing.
    """
    if smoothing == 0.0 and z_loss == 0.0:
        return sums[0].log() + (top - sums[1])  # of what is near 0 first: the maximum may be large
    lse = top + sums[0].log()
    losses = lse - (1.0 - smoothing) * sums[1] + z_loss * lse.square()
    return losses - smoothing / size * sums[2] if smoothing else losses


def native_gradient_(
    logits: Float[Tensor, "rows columns"],
    targets: Int64[Tensor, " rows"],
    grad: Float32[Tensor, " one_or_rows"],
    whole: tuple[Float32[Tensor, " rows"], Float32[Tensor, " rows"]],
    vocabulary: Vocabulary,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Write over the logits the gradient of each row's loss, times the row's `grad` (or the one number for all).

    whole: maximum and sum of exp relative to it, over the whole vocabulary. Padding and rows without a target get 0.
    """
    part = (vocabulary.start, vocabulary.valid, vocabulary.size, IGNORE_INDEX)
    torch.ops.dist_llm.cross_entropy_gradient_(logits, targets, grad, *whole, *part, smoothing, z_loss)
    # The dispatcher does not count what an op of the stable ABI writes: whoever saved these logits must find out.
    torch.autograd.graph.increment_version(logits)


def register_native() -> None:
    """Tell torch the shapes of the library's ops; once, after it was loaded."""

    def shapes(logits: Tensor, targets: Tensor, start: int, valid: int, ignored: int) -> tuple[Tensor, Tensor]:
        rows = logits.shape[0]
        return logits.new_empty(rows, dtype=torch.float32), logits.new_empty((3, rows), dtype=torch.float32)

    register_op(
        "cross_entropy_statistics",
        shapes,
        lambda ctx, inputs, output: ctx.mark_non_differentiable(*output),
        lambda ctx, *grads: (None,) * 5,
    )
    torch.library.register_fake("dist_llm::cross_entropy_gradient_", lambda *arguments: None)
