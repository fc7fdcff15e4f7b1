"""Dropout whose mask is a function of (key, global sample, token, feature), so every layout drops the same elements."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dist_llm.ops.counter_rng import hash_counter, keep_mask


def dropout(
    x: Float[Tensor, "batch seq width"],
    drop: float,
    key: int | Int64[Tensor, ""],
    samples: Int64[Tensor, " batch"],
    tokens: Int64[Tensor, " seq"],
) -> Float[Tensor, "batch seq width"]:
    """Zero elements of x with probability `drop` and scale the rest by 1 / (1 - drop).

    samples: global sample numbers; tokens: positions in the whole sequence.
    """
    rows = hash_counter(tokens[None, :], hash_counter(samples, key)[:, None])
    features = torch.arange(x.shape[2], device=x.device)
    mask = keep_mask(features, rows[:, :, None], drop)
    return torch.where(mask, x * (1.0 / (1.0 - drop)), torch.zeros((), dtype=x.dtype, device=x.device))
