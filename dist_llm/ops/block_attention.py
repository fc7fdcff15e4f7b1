"""Attention of some queries to some keys, as pieces that add up: outputs merge by their log-sum-exp, gradients by sums.

    out, lse = softmax(s) v, log sum exp s       s = q k^T / sqrt(d), -inf where masked
    merged   = out_a exp(lse_a - lse) + out_b exp(lse_b - lse),   lse = logaddexp(lse_a, lse_b)

Sources: Milakov & Gimelshein 2018 (online softmax); Dao 2023 (the backward from the final log-sum-exp alone).
Queries are [B, G, R, T, d]: G key/value heads, each asked by R query heads. Sums are in fp32, or fp64 for fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Queries, keys, values and which of them meet; mask None: all do, unless causal: keys no later than the query."""

    query: Float[Tensor, "batch groups repeats queries head"]
    key: Float[Tensor, "batch groups keys head"]
    value: Float[Tensor, "batch groups keys head"]
    mask: Bool[Tensor, "batch 1 queries keys"] | None
    causal: bool

    def scores(self) -> Float[Tensor, "batch groups repeats queries keys"]:
        """Return the scaled products, -inf where a query does not see a key."""
        scores = torch.einsum("bgrqd,bgkd->bgrqk", self.query, self.key) / math.sqrt(self.query.shape[-1])
        if self.mask is not None:
            return scores.masked_fill(~self.mask[:, :, None], -math.inf)
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            return scores.masked_fill(later, -math.inf)
        return scores


def attend(
    piece: Piece,
) -> tuple[Float[Tensor, "batch groups repeats queries head"], Float[Tensor, "batch groups repeats queries"]]:
    """Return output and log-sum-exp; a query that sees no key of the piece has output 0 and log-sum-exp -inf."""
    scores = piece.scores()
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, piece.value), lse


def merge(
    out: Float[Tensor, "*rows head"],
    lse: Float[Tensor, "*rows"],
    more: Float[Tensor, "*rows head"],
    more_lse: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows head"], Float[Tensor, "*rows"]]:
    """Return output and log-sum-exp over the keys of both; `lse` is finite: its queries have seen a key."""
    both = torch.logaddexp(lse, more_lse)
    return out * (lse - both).exp()[..., None] + more * (more_lse - both).exp()[..., None], both


def gradients(
    piece: Piece,
    lse: Float[Tensor, "batch groups repeats queries"],
    grad_out: Float[Tensor, "batch groups repeats queries head"],
    delta: Float[Tensor, "batch groups repeats queries"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the piece adds to the gradients of its query, key and value.

    lse: over all keys, of this piece and the others; delta: sum of grad_out x out over the head's width.
    """
    weights = torch.exp(piece.scores() - lse[..., None])
    grad_value = torch.einsum("bgrqk,bgrqd->bgkd", weights, grad_out)
    grad_weights = torch.einsum("bgrqd,bgkd->bgrqk", grad_out, piece.value)
    grad_scores = weights * (grad_weights - delta[..., None]) / math.sqrt(piece.query.shape[-1])
    grad_query = torch.einsum("bgrqk,bgkd->bgrqd", grad_scores, piece.key)
    return grad_query, torch.einsum("bgrqk,bgrqd->bgkd", grad_scores, piece.query), grad_value
