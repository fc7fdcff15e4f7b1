"""A dropout site: its key names (seed, layer, site); the mask then depends on sample, token and feature only."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor, nn

from dist_llm.ops.counter_rng import key_of
from dist_llm.ops.dropout import dropout


class Dropout(nn.Module):
    """Counter-based dropout on [B, T, D].

    sequence_part is which equal part of the sequence the input holds (0 for a whole sequence): whoever splits
    the sequence sets it.
    """

    def __init__(self, drop: float, seed: int, site: str) -> None:
        super().__init__()
        self.drop = drop
        self.key = key_of("dropout", seed, site)
        self.sequence_part = 0

    def forward(
        self, x: Float[Tensor, "batch seq width"], samples: Int64[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch seq width"]:
        """Drop elements of x; samples are global sample numbers."""
        if self.drop == 0.0 or not self.training:
            return x
        if samples is None:
            raise ValueError("dropout needs the global sample numbers of the batch")
        return dropout(x, self.drop, self.key, samples, self.sequence_part * x.shape[1])
