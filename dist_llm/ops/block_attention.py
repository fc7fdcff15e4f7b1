"""Attention of some queries to some keys, as pieces that add up: outputs merge by their log-sum-exp, gradients by sums.

    out, lse = softmax(s) v, log sum exp s       s = scale q k^T, -inf where masked
    merged   = out_a exp(lse_a - lse) + out_b exp(lse_b - lse),   lse = logaddexp(lse_a, lse_b)

Sources: Milakov & Gimelshein 2018 (online softmax); Dao 2023 (the backward from the final log-sum-exp alone).
This is the reference, with all scores at once and sums in fp32 (fp64 for fp64); ops/fused_attention.py has the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def default_scale(head: int) -> float:
    """Return the factor on products of queries and keys of so many features, 1 / sqrt(head)."""
    return 1.0 / math.sqrt(head)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the format in which pieces add up: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Piece:
    """Queries, keys, values and which of them meet; mask None: all do, unless causal: keys no later than the query.

    Query head h asks key head h // (heads / groups).
    """

    query: Float[Tensor, "batch heads queries head"]
    key: Float[Tensor, "batch groups keys head"]
    value: Float[Tensor, "batch groups keys head"]
    mask: Bool[Tensor, "batch 1 queries keys"] | None
    causal: bool
    scale: float

    def _wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [B, G, R, q, d], key and value in the format of sums."""
        into = wide(self.query.dtype)
        query = torch.unflatten(self.query, 1, (self.key.shape[1], -1))
        return query.to(into), self.key.to(into), self.value.to(into)

    def scores(self) -> Float[Tensor, "batch groups repeats queries keys"]:
        """Return the scaled products, -inf where a query does not see a key."""
        query, key, _ = self._wide()
        scores = torch.einsum("bgrqd,bgkd->bgrqk", query, key) * self.scale
        if self.mask is not None:
            return scores.masked_fill(~self.mask[:, :, None], -math.inf)
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            return scores.masked_fill(later, -math.inf)
        return scores


def attend(piece: Piece) -> tuple[Float[Tensor, "batch heads queries head"], Float[Tensor, "batch heads queries"]]:
    """Return output and log-sum-exp; a query that sees no key of the piece has output 0 and log-sum-exp -inf."""
    scores = piece.scores()
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    out = torch.einsum("bgrqk,bgkd->bgrqd", weights, piece._wide()[2])
    return out.flatten(1, 2).to(piece.query.dtype), lse.flatten(1, 2)


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
    out: Float[Tensor, "batch heads queries head"],
    lse: Float[Tensor, "batch heads queries"],
    grad_out: Float[Tensor, "batch heads queries head"],
) -> tuple[
    Float[Tensor, "batch heads queries head"],
    Float[Tensor, "batch groups keys head"],
    Float[Tensor, "batch groups keys head"],
]:
    """Return what the piece adds to the gradients of its query, key and value.

    out, lse: over all keys, of this piece and the others.
    """
    query, key, value = piece._wide()
    whole, grad, sums = (torch.unflatten(x, 1, query.shape[1:3]).to(query.dtype) for x in (out, grad_out, lse))
    weights = torch.exp(piece.scores() - sums[..., None])
    grad_value = torch.einsum("bgrqk,bgrqd->bgkd", weights, grad)
    grad_weights = torch.einsum("bgrqd,bgkd->bgrqk", grad, value)
    delta = (grad * whole).sum(dim=-1)
    grad_scores = weights * (grad_weights - delta[..., None]) * piece.scale
    grad_query = torch.einsum("bgrqk,bgkd->bgrqd", grad_scores, key).flatten(1, 2)
    grad_key = torch.einsum("bgrqk,bgrqd->bgkd", grad_scores, query)
    return tuple(x.to(piece.query.dtype) for x in (grad_query, grad_key, grad_value))  # type: ignore[return-value]
