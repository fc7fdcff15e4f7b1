"""The transformer's shape and layout; one decoder-only model whose options cover GPT-2 and Llama."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_llm.config.base import Count, Section


class RopeConfig(Section):
    """Rotary positions (Su et al. 2021) and the two scalings that published models use."""

    theta: float = Field(10000.0, gt=1)
    scaling: Literal["none", "llama3", "yarn"] = "none"
    factor: float = Field(1.0, ge=1)
    original_max_seq_len: Count = 8192
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    attention_factor: float | None = Field(None, gt=0)


class ModelConfig(Section):
    """Shape and options of the decoder-only transformer. Widths are in elements, vocab_size in tokens (unpadded)."""

    family: Literal["gpt2", "llama"]
    num_layers: Count
    hidden_size: Count
    num_heads: Count
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    ffn_hidden_size: Count
    vocab_size: Count
    max_seq_len: Count
    position: Literal["learned", "rope", "none"]
    rope: RopeConfig = RopeConfig()
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float = Field(1e-5, gt=0)
    norm_placement: Literal["pre", "post"] = "pre"
    activation: Literal["gelu", "gelu_tanh", "swiglu"]
    bias: bool
    qk_norm: bool = False
    tie_embeddings: bool
    dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    init_std: float = Field(0.02, gt=0)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads (num_heads when not grouped)."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head in elements."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads
