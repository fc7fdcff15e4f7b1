"""A dropout site: its key names (seed, layer, site); the mask then depends on sample, token and feature only."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor, nn

from dist_llm.ops.context_share import ContextShare
from dist_llm.ops.counter_rng import key_of
from dist_llm.ops.dropout import dropout


class Dropout(nn.Module):
    """Counter-based dropout on [B, T, D].

    context: this rank's share of each sequence. Of the share the input holds equal part `sequence_part` of
    `sequence_parts`. Whoever splits the sequence sets them.
    """

    def __init__(self, drop: float, seed: int, site: str) -> None:
        super().__init__()
        self.drop = drop
        self.key: int | Tensor = key_of("dropout", seed, site)
        self.context = ContextShare()
        self.sequence_part, self.sequence_parts = 0, 1

    def forward(
        self, x: Float[Tensor, "batch seq width"], samples: Int64[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch seq width"]:
        """Drop elements of x; samples are global sample numbers."""
        if self.drop == 0.0 or not self.training:
            return x
        if samples is None:
            raise ValueError("dropout needs the global sample numbers of the batch")
        length = x.shape[1]
        share = self.context.positions(length * self.sequence_parts, x.device)
        return dropout(x, self.drop, self.key, samples, share.narrow(0, self.sequence_part * length, length))
