"""Causal self-attention with grouped key/value heads, optional QK-norm, rotary positions and document masks.

The number of heads is read off the width of q, so the same code runs on a share of the heads.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dist_llm.config.model import ModelConfig
from dist_llm.models.norm import RMSNorm
from dist_llm.models.rope import RopeTable
from dist_llm.ops.causal_attention import Attend, CausalAttention
from dist_llm.ops.context_share import ContextShare
from dist_llm.ops.linear import Linear
from dist_llm.ops.registry import Kernels
from dist_llm.ops.rope import rotate_pair


class Attention(nn.Module):
    """Projections wq, wk, wv (split by heads) and wo around scaled dot-product attention."""

    kernels = Kernels()

    def __init__(self, config: ModelConfig, rope: RopeTable | None) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_width
        self.wq = Linear(width, config.num_heads * head, bias=config.bias)
        self.wk = Linear(width, config.kv_heads * head, bias=config.bias)
        self.wv = Linear(width, config.kv_heads * head, bias=config.bias)
        self.wo = Linear(config.num_heads * head, width, bias=config.bias)
        self.q_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else None
        self.rope = rope
        self.head_width = head
        self.query_scale = config.query_scale
        self.drop = config.attention_dropout
        self.attend: Attend = CausalAttention()
        self.context = ContextShare()

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        mask: Any,
    ) -> Float[Tensor, "batch _ width"]:
        """Attend over x; mask None: plain causal. Under sequence parallelism this rank's part comes back."""
        query, key, value = (w(x).unflatten(-1, (-1, self.head_width)) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rope is not None:
            query, key = rotate_pair(query, key, self.rope(query, self.context), self.kernels.rope)
        if self.query_scale != 1:  # here and not in `attend`, of which there are several
            query = query * self.query_scale
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = self.attend(query, key, value, mask, self.drop if self.training else 0.0)
        projected: Tensor = self.wo(out.transpose(1, 2).flatten(-2))
        return projected
