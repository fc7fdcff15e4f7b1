"""What a step sums over all ranks, and what follows from it for the update: on the device, so that nothing waits.

    unit = counted tokens x loss unit     norm = sqrt(sum of squares) / unit     divisor = unit / min(1, clip / norm)

The host reads them once, after all of a step is queued. In fp64, where the device's arithmetic is the host's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64
from torch import Tensor


@dataclass(frozen=True)
class Figures:
    """Totals as the host reads them: mean loss, counted tokens, gradient norm, other sums, whether nothing changed."""

    loss: float
    tokens: int
    grad_norm: float
    others: tuple[float, ...]
    skipped: bool


@dataclass(frozen=True)
class Totals:
    """Sums of all ranks. divisor: of the gradients. skip: 1 where loss or norm is not finite, else 0."""

    values: Float64[Tensor, " values"]
    divisor: Float64[Tensor, ""]
    skip: Float32[Tensor, ""]

    def read(self) -> Figures:
        """Return them as numbers. Waits for the device."""
        loss, tokens, grad_norm, skip, *others = self.values.tolist()
        return Figures(loss, int(tokens), grad_norm, tuple(others), bool(skip))


def totals_of(sums: Float64[Tensor, " sums"], loss_unit: float, clip_norm: float) -> Totals:
    """Return what follows from the sums of all ranks: loss in its unit, counted tokens, squared norm, then others."""
    loss, counted, squares = sums[:3].unbind()
    unit = torch.where(counted > 0, counted * loss_unit, 1.0)
    mean, norm = loss / unit, squares.sqrt() / unit
    coefficient = (clip_norm / (norm + 1e-6)).clamp(max=1.0) if clip_norm > 0 else torch.ones_like(norm)
    skip = ~(mean.isfinite() & norm.isfinite())
    values = torch.cat((torch.stack((mean, counted, norm, skip.double())), sums[3:]))
    return Totals(values, unit / coefficient, skip.float())
