"""The norm of the whole gradient, each logical element counted once however it is split or replicated.

    norm^2 = sum over ranks of ||g||^2 of the shards for which that rank is primary

Squares are added in fp64, so the norm does not depend on the order of ranks beyond the last bits of fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float64
from torch import Tensor

from dist_llm.parallel.shards import LocalShard


def primary_square_sum(shards: Iterable[LocalShard], device: torch.device) -> Float64[Tensor, ""]:
    """Return this rank's part of the squared gradient norm. Issues nothing."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for shard in shards:
        grad = shard.gradient()
        if shard.primary and grad is not None and grad.numel():
            total += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    return total
