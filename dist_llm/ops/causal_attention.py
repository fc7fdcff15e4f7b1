"""Causal attention of tokens confined to their documents, and what may stand in its place where others hold the keys.

softmax(q k^T / sqrt(d)) v over earlier tokens of the same document
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional


@runtime_checkable
class Attend(Protocol):
    """softmax(q k^T / sqrt(d)) v over earlier tokens of the same document, wherever they are."""

    @property
    def traceable(self) -> bool:
        """Whether torch.compile can look inside."""
        ...

    def mask(self, documents: Int64[Tensor, "batch whole"], /) -> Any:
        """Return what confines attention to documents, for `__call__` and nobody else to read."""
        ...

    def __call__(
        self,
        query: Float[Tensor, "batch heads seq head"],
        key: Float[Tensor, "batch groups seq head"],
        value: Float[Tensor, "batch groups seq head"],
        mask: Any,
        drop: float,
        /,
    ) -> Float[Tensor, "batch heads seq head"]:
        """Attend; mask None: plain causal. drop: probability of dropping a weight."""
        ...


class CausalAttention:
    """Attention with all tokens here, by torch's scaled_dot_product_attention."""

    traceable = True

    def mask(self, documents: Int64[Tensor, "batch seq"]) -> Bool[Tensor, "batch 1 seq seq"]:
        """Return whether the key (last dim) is not later than the query and in its document."""
        return (documents[:, None, :, None] == documents[:, None, None, :]).tril()

    def __call__(
        self,
        query: Float[Tensor, "batch heads seq head"],
        key: Float[Tensor, "batch groups seq head"],
        value: Float[Tensor, "batch groups seq head"],
        mask: Bool[Tensor, "batch 1 seq seq"] | None,
        drop: float,
    ) -> Float[Tensor, "batch heads seq head"]:
        """Attend; mask None: plain causal. drop: probability of dropping a weight."""
        grouped = query.shape[1] != key.shape[1]
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=drop, is_causal=mask is None, enable_gqa=grouped
        )
