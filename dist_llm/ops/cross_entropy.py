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
from dist_llm.ops.backends import NATIVE, kernel, overload
from dist_llm.types import IGNORE_INDEX

SCHEMAS = {
    "cross_entropy_statistics": "(Tensor logits, Tensor targets, int start, int valid, int ignored) "
    "-> (Tensor, Tensor)",
    "cross_entropy_gradient_": "(Tensor(a!) logits, Tensor targets, Tensor grad, Tensor top, Tensor raised, "
    "int start, int valid, int size, int ignored, float smoothing, float z_loss) -> ()",
}


@dataclass(frozen=True)
class Vocabulary:
    """A rank's columns: the first one's place in the vocabulary, and how many of them belong to it; `size` in all."""

    start: int
    valid: int
    size: int


def local_statistics(
    logits: Float[Tensor, "rows columns"],
    targets: Int64[Tensor, " rows"],
    vocabulary: Vocabulary,
    backend: str = NATIVE,
) -> tuple[Float32[Tensor, " rows"], Float32[Tensor, "3 rows"]]:
    """Return of this rank's columns the maximum, and: sum of exp(z - maximum), target's logit or 0, sum of logits.

    Of a row that is not counted: 0, and 1, 0, 0. Logits must be contiguous.
    """
    part = (vocabulary.start, vocabulary.valid, IGNORE_INDEX)
    out: tuple[Tensor, Tensor] = kernel("cross_entropy_statistics", backend)(logits, targets, *part)
    return out


def token_losses(
    top: Float32[Tensor, " rows"],
    sums: Float32[Tensor, "numbers rows"],
    size: int,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float32[Tensor, " rows"]:
    """Return each row's loss in nats from its statistics over the whole vocabulary of `size` tokens.

    sums: as `local_statistics` gives them, relative to `top`; the third is read only for smoothing.
    """
    if smoothing == 0.0 and z_loss == 0.0:
        return sums[0].log() + (top - sums[1])  # of what is near 0 first: the maximum may be large
    lse = top + sums[0].log()
    losses = lse - (1.0 - smoothing) * sums[1] + z_loss * lse.square()
    return losses - smoothing / size * sums[2] if smoothing else losses


def gradient_(
    logits: Float[Tensor, "rows columns"],
    targets: Int64[Tensor, " rows"],
    grad: Float32[Tensor, " one_or_rows"],
    whole: tuple[Float32[Tensor, " rows"], Float32[Tensor, " rows"]],
    vocabulary: Vocabulary,
    terms: tuple[float, float] = (0.0, 0.0),
    backend: str = NATIVE,
) -> None:
    """Write over the logits the gradient of each row's loss, times the row's `grad` (or the one number for all).

    whole: maximum and sum of exp relative to it, over the whole vocabulary. terms: label smoothing and the z-loss's
    factor. Padding and rows without a target get 0.
    """
    part = (vocabulary.start, vocabulary.valid, vocabulary.size, IGNORE_INDEX)
    kernel("cross_entropy_gradient_", backend)(logits, targets, grad, *whole, *part, *terms)
    # The dispatcher does not count what the kernels write: whoever saved these logits must find out.
    torch.autograd.graph.increment_version(logits)


def register(backend: str) -> None:
    """Tell torch the shapes of a backend's overloads; once, when they are defined."""

    def shapes(logits: Tensor, targets: Tensor, start: int, valid: int, ignored: int) -> tuple[Tensor, Tensor]:
        rows = logits.shape[0]
        return logits.new_empty(rows, dtype=torch.float32), logits.new_empty((3, rows), dtype=torch.float32)

    register_op(
        "cross_entropy_statistics",
        backend,
        shapes,
        lambda ctx, inputs, output: ctx.mark_non_differentiable(*output),
        lambda ctx, *grads: (None,) * 5,
    )
    torch.library.register_fake(f"dist_llm::{overload('cross_entropy_gradient_', backend)}", lambda *arguments: None)
