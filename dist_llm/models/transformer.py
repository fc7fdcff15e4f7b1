"""One decoder-only transformer: GPT-2 and Llama are two settings of its options.

    tokens -> embed -> [attention + mlp, pre- or post-norm residuals] x L -> head -> logits

A stage of a pipeline is the same module with parts removed: names never change. Single-device code: it knows no rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dist_llm.config.model import ModelConfig
from dist_llm.models.attention import Attention
from dist_llm.models.dropout import Dropout
from dist_llm.models.mlp import MLP
from dist_llm.models.moe import MoE, Tally
from dist_llm.models.norm import add_and_norm, build_norm
from dist_llm.models.rope import RopeTable
from dist_llm.ops.causal_attention import Attend, CausalAttention
from dist_llm.ops.context_share import ContextShare
from dist_llm.ops.linear import Linear


class Positions(nn.Embedding):
    """A learned table of positions; looked up for the same positions of every sequence, by default 0..T-1."""

    context = ContextShare()

    def forward(self, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "seq width"]:
        """Return the rows of the positions that the tokens have."""
        length = tokens.shape[1]
        return (
            self.weight[:length]
            if self.context.ranks == 1
            else self.weight[self.context.positions(length, tokens.device)]
        )


class Embedding(nn.Module):
    """Token table, plus a learned position table when configured, plus dropout."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.positions = Positions(config.max_seq_len, config.hidden_size) if learned else None
        self.multiplier = config.mup.embedding_multiplier
        self.dropout = Dropout(config.dropout, seed, "embed")

    def forward(
        self, tokens: Int64[Tensor, "batch seq"], samples: Int64[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch _ width"]:
        """Return the hidden states of tokens; under sequence parallelism this rank's part of them."""
        hidden = self.tokens(tokens)
        if self.positions is not None:
            hidden = hidden + self.positions(tokens)
        if self.multiplier != 1:
            hidden = hidden * self.multiplier
        out: Tensor = self.dropout(hidden, samples)
        return out


class Block(nn.Module):
    """Attention and MLP, each with its norm, dropout and residual."""

    def __init__(self, config: ModelConfig, seed: int, index: int, rope: RopeTable | None, tally: Tally) -> None:
        super().__init__()
        self.attention = Attention(config, rope)
        self.mlp = MoE(config, index, tally) if config.has_experts(index) else MLP(config)
        self.attention_norm = build_norm(config, config.hidden_size)
        self.mlp_norm = build_norm(config, config.hidden_size)
        self.attention_dropout = Dropout(config.dropout, seed, f"layers.{index}.attention")
        self.mlp_dropout = Dropout(config.dropout, seed, f"layers.{index}.mlp")
        self.post_norm = config.norm_placement == "post"

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        samples: Int64[Tensor, " batch"] | None,
        mask: Any,
    ) -> Float[Tensor, "batch seq width"]:
        """Map hidden states; mask: of the attention, None: plain causal."""
        if self.post_norm:
            x, _ = add_and_norm(self.attention_norm, x, self.attention_dropout(self.attention(x, mask), samples))
            return add_and_norm(self.mlp_norm, x, self.mlp_dropout(self.mlp(x), samples))[0]
        attended = self.attention_dropout(self.attention(self.attention_norm(x), mask), samples)
        normed, x = add_and_norm(self.mlp_norm, x, attended)
        out: Tensor = x + self.mlp_dropout(self.mlp(normed), samples)
        return out


class Head(nn.Module):
    """Final norm (pre-norm models) and projection to the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = build_norm(config, config.hidden_size) if config.norm_placement == "pre" else None
        self.projection = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.scale = config.output_scale

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch _ vocab"]:
        """Return logits; under tensor parallelism those of this rank's columns, for the whole sequence."""
        x = x if self.norm is None else self.norm(x)
        if self.scale != 1:  # the input, of which there is less than of logits
            x = x * self.scale
        logits: Tensor = self.projection(x)
        return logits


class Transformer(nn.Module):
    """The whole model, or a pipeline stage of it after `keep_stage`."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.rope = rope = RopeTable(config) if config.position == "rope" else None
        self.tally = Tally()
        self.embed: Embedding | None = Embedding(config, seed)
        self.layers = nn.ModuleDict(
            {str(i): Block(config, seed, i, rope, self.tally) for i in range(config.num_layers)}
        )
        self.head: Head | None = Head(config)
        self.attend: Attend = CausalAttention()
        self.context = ContextShare()
        self.sequence_part, self.sequence_parts = 0, 1
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's projection the token table itself, when configured and both are here."""
        if self.config.tie_embeddings and self.embed is not None and self.head is not None:
            self.head.projection.weight = self.embed.tokens.weight

    def keep_stage(self, layers: Sequence[int], first: bool, last: bool) -> None:
        """Remove what this stage does not hold: other layers, the embedding unless first, the head unless last."""
        for name in list(self.layers):
            if int(name) not in layers:
                del self.layers[name]
        if not first:
            self.embed = None
        if not last:
            self.head = None

    def forward(
        self,
        inputs: Int64[Tensor, "batch seq"] | Float[Tensor, "batch seq width"],
        samples: Int64[Tensor, " batch"] | None = None,
        documents: Int64[Tensor, "batch _"] | None = None,
    ) -> Float[Tensor, "batch _ _"]:
        """Run the parts that are here.

        inputs: tokens when the embedding is here, else hidden states. samples: global sample numbers (dropout).
        documents: attention stays inside a document; of the whole sequence, also where inputs are a share of it.
        Returns logits when the head is here, else hidden states.
        """
        mask = None if documents is None else self.attend.mask(documents)
        hidden = inputs if self.embed is None else self.embed(inputs, samples)
        if self.rope is not None:
            # A compiled block must find the table that it would otherwise build, and be compiled for both.
            length = hidden.shape[1] * self.sequence_parts * self.context.ranks
            self.rope.prepare(length, hidden.device, hidden.dtype)
        for layer in self.layers.values():
            hidden = layer(hidden, samples, mask)
        return hidden if self.head is None else self.head(hidden)


def build_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Return the whole model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return Transformer(config, seed)
