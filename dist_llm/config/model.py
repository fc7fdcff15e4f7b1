"""The transformer's shape and layout; one decoder-only model whose options cover GPT-2 and Llama."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from dist_llm.config.base import Count, CountOrZero, Section


class RopeConfig(Section):
    """Rotary positions (Su et al. 2021) and the two scalings that published models use."""

    theta: float = Field(10000.0, gt=1)
    """Base of the angular frequencies, theta^(-2i / head width) for the i-th pair of features."""
    scaling: Literal["none", "llama3", "yarn"] = "none"
    """How frequencies are lowered for longer texts: llama3 as Llama 3.1 does (Meta 2024), yarn as Peng et al. 2023."""
    factor: float = Field(1.0, ge=1)
    """What scaling divides the low frequencies by; 1 without scaling."""
    original_max_seq_len: Count = 8192
    """Length that the model was trained on before scaling, in tokens; read by `llama3` and `yarn`."""
    low_freq_factor: float = Field(1.0, gt=0)
    """Under `llama3`, frequencies of fewer turns than this in original_max_seq_len tokens are divided by factor."""
    high_freq_factor: float = Field(4.0, gt=0)
    """Under `llama3`, frequencies of more turns than this in original_max_seq_len tokens are kept; between, a blend."""
    beta_fast: float = Field(32.0, gt=0)
    """YaRN's beta (Peng et al. 2023): frequencies of more turns than this in original_max_seq_len tokens are kept."""
    beta_slow: float = Field(1.0, gt=0)
    """YaRN's alpha (Peng et al. 2023): frequencies of fewer turns are divided by factor; up to beta_fast, a blend."""
    attention_factor: float | None = Field(None, gt=0)
    """What YaRN multiplies rotated queries and keys by (Peng et al. 2023); null: 0.1 ln(factor) + 1."""


class MoEConfig(Section):
    """Experts in place of feed-forward layers: a router sends each token to a few (Shazeer et al. 2017)."""

    num_experts: CountOrZero = 0
    """Experts of each such layer; 0: no layer has any, and the rest of this section is not read."""
    top_k: Count = 2
    """Experts that a token goes to."""
    ffn_hidden_size: Count | None = None
    """Inner width of an expert, in elements; null: model.ffn_hidden_size."""
    num_shared: CountOrZero = 0
    """Experts that every token goes to beside those, as one layer of so many times the width (Dai et al. 2024)."""
    num_dense_layers: CountOrZero = 0
    """First layers that keep a feed-forward layer of model.ffn_hidden_size."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become weights: softmax over all experts, or sigmoid of each (DeepSeek-V3 2024)."""
    normalize: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    scale: float = Field(1.0, gt=0)
    """What the weights are then multiplied by."""
    balance_loss: float = Field(0.0, ge=0)
    """Coefficient of the load-balance loss, by sequence (Fedus et al. 2021)."""
    z_loss: float = Field(0.0, ge=0)
    """Coefficient of the router's z loss (Zoph et al. 2022)."""
    bias_rate: float = Field(0.0, ge=0)
    """How far a step moves the bias by which experts are chosen, towards equal loads (Wang et al. 2024); 0: never."""
    capacity_factor: float | None = Field(None, gt=0)
    """Rows that an expert takes, over the mean; what is beyond is dropped, and layouts then differ. null: dropless."""


class MupConfig(Section):
    """Maximal update parametrisation: one learning rate for every width (Yang et al. 2022, Table 8; docs/mup.md)."""

    base_width: Count | None = None
    """hidden_size of the model on which settings were tuned, in elements; null: standard parametrisation."""
    base_head_width: Count | None = None
    """Width of that model's heads, in elements; null: as here (more width is more heads)."""
    base_num_heads: Count | None = None
    """Query heads of that model; null: all heads together are in proportion to hidden_size."""
    base_ffn_width: Count | None = None
    """Inner width of that model's feed-forward layers, in elements; null: in proportion to hidden_size."""
    base_expert_width: Count | None = None
    """Inner width of that model's experts, in elements; null: in proportion to hidden_size."""
    output_multiplier: float = Field(1.0, gt=0)
    """What logits are multiplied by, beside base_width / hidden_size."""
    embedding_multiplier: float = Field(1.0, gt=0)
    """What embeddings are multiplied by, those of positions included."""


class ModelConfig(Section):
    """Shape and options of the decoder-only transformer."""

    family: Literal["gpt2", "llama"]
    """Published layout that the other options follow; a label kept with the run, the options alone make the model."""
    num_layers: Count
    """Transformer blocks, each attention and a feed-forward layer."""
    hidden_size: Count
    """Width of the hidden states between blocks, in elements."""
    num_heads: Count
    """Query heads of each attention layer."""
    num_kv_heads: Count | None = None
    """Key and value heads, each shared by equally many query heads (GQA, Ainslie et al. 2023); null: num_heads."""
    head_dim: Count | None = None
    """Width of one head, in elements; null: hidden_size / num_heads."""
    ffn_hidden_size: Count
    """Inner width of the feed-forward layer, in elements."""
    vocab_size: Count
    """Tokens of the vocabulary, the pieces of the tokenizer; the padding that a layout adds is not counted."""
    max_seq_len: Count
    """Longest sequence, in tokens: the rows of a learned position table, and the context when generating."""
    position: Literal["learned", "rope", "none"]
    """How a token's place is known: a learned table (GPT-2), rotated queries and keys (rope), or by causality alone."""
    rope: RopeConfig = RopeConfig()
    """Rotary positions; read under `position: rope`."""
    norm: Literal["layernorm", "rmsnorm"]
    """Normalisation: LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance (to the mean square, for RMSNorm) before its root is taken."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Norm before each half of a block and after the last block (pre), or after each residual sum (post)."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"]
    """Feed-forward activation: GELU (Hendrycks & Gimpel 2016), its tanh approximation, or SwiGLU (Shazeer 2020)."""
    bias: bool
    """Whether the linear layers of blocks, and LayerNorm, add a bias; the output projection never does."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before rotation (Qwen3, Yang et al. 2025)."""
    tie_embeddings: bool
    """Whether the output projection is the token embedding itself (Press & Wolf 2017)."""
    moe: MoEConfig = MoEConfig()
    """Experts in place of feed-forward layers; none by default."""
    mup: MupConfig = MupConfig()
    """Maximal update parametrisation; off by default."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an element of the embeddings, or of what a half of a block adds, is dropped in training."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an attention weight is dropped in training; above 0 each layout draws other masks."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial matrices; those that end a residual branch, over sqrt(2 num_layers) (GPT-2)."""

    @property
    def width_ratio(self) -> float:
        """How many times wider than the base model this one is; 1 under the standard parametrisation."""
        return self.hidden_size / self.mup.base_width if self.mup.base_width is not None else 1.0

    @property
    def heads_ratio(self) -> float:
        """The same of the width of all query heads together."""
        base = self.mup.base_head_width if self.mup.base_head_width is not None else self.head_width
        heads = self.mup.base_num_heads
        return self._inner_ratio(self.num_heads * self.head_width, None if heads is None else heads * base)

    @property
    def ffn_ratio(self) -> float:
        """The same of the inner width of feed-forward layers."""
        return self._inner_ratio(self.ffn_hidden_size, self.mup.base_ffn_width)

    @property
    def expert_ratio(self) -> float:
        """The same of the inner width of experts."""
        return self._inner_ratio(self.expert_width, self.mup.base_expert_width)

    def _inner_ratio(self, inner: int, base: int | None) -> float:
        return self.width_ratio if base is None else inner / base

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, so that logits go as 1 / head width and are as ever at the base width."""
        base = self.mup.base_head_width
        return 1.0 if base is None else math.sqrt(base / self.head_width)

    @property
    def output_scale(self) -> float:
        """What logits are multiplied by."""
        return self.mup.output_multiplier / self.width_ratio

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads (num_heads when not grouped)."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def expert_width(self) -> int:
        """Inner width of one expert in elements."""
        return self.moe.ffn_hidden_size if self.moe.ffn_hidden_size is not None else self.ffn_hidden_size

    @property
    def num_expert_layers(self) -> int:
        """Layers that have experts."""
        return max(0, self.num_layers - self.moe.num_dense_layers) if self.moe.num_experts else 0

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return self.moe.num_experts > 0 and layer >= self.moe.num_dense_layers

    @property
    def head_width(self) -> int:
        """Width of one head in elements."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads
