"""Which tokens of a sequence a context rank holds: of 2n equal chunks the r-th from the front and from the back.

    n = 2:  | 0 | 1 | 1 | 0 |        under a causal mask every rank then has the same work ("zig-zag")

Source: the load-balanced cut of Megatron-LM's context parallelism and of zig-zag ring attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class ContextShare:
    """The tokens of rank `rank` of `ranks`; all of them by default. A share holds its tokens in ascending order."""

    rank: int = 0
    ranks: int = 1

    def positions(self, num_tokens: int, device: torch.device) -> Int64[Tensor, " {num_tokens}"]:
        """Return the positions in the whole sequence of a share of num_tokens tokens (even where it is split)."""
        if self.ranks == 1:
            return torch.arange(num_tokens, device=device)
        chunk = num_tokens // 2
        starts = (self.rank * chunk, (2 * self.ranks - 1 - self.rank) * chunk)
        return torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])

    def take(self, whole: Int64[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq//{self.ranks}"]:
        """Return the share's columns of something that each token of the whole sequence has.

        Raises ValueError where the tokens do not cut into equal chunks.
        """
        if self.ranks == 1:
            return whole
        if whole.shape[1] % (2 * self.ranks):
            raise ValueError(f"{whole.shape[1]} tokens cannot be cut into {2 * self.ranks} equal chunks")
        return whole[:, self.positions(whole.shape[1] // self.ranks, whole.device)]
