"""Our attention inside Megatron-Core's layers, where its own cannot: over context ranks, and inside of documents.

Megatron-Core's core attention materialises all scores and knows neither; Transformer Engine's knows a ring of ranks.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from dist_llm.ops.causal_attention import Attend


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v by `attend`, in the order of dims that Megatron-Core has."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, attend: Attend, **kwargs: Any) -> None:
        super().__init__()
        self._attend = attend

    def forward(
        self,
        query: Float[Tensor, "seq batch heads head"],
        key: Float[Tensor, "seq batch groups head"],
        value: Float[Tensor, "seq batch groups head"],
        attention_mask: Any,
        **more: Any,
    ) -> Float[Tensor, "seq batch width"]:
        """Attend; attention_mask: what `attend` made of documents, None: plain causal."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return self._attend(q, k, v, attention_mask, 0.0).permute(2, 0, 1, 3).flatten(2)
