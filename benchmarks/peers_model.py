"""The decoder-only transformer of a config, written as one writes it in plain PyTorch: eager ops, no framework.

    tokens -> table (+ positions) -> [x + attention(norm(x)); x + mlp(norm(x))] x L -> norm -> projection

Only what the cases of peers.py need: pre-norm; GELU or SwiGLU; learned positions or rotary ones; grouped keys. Its
parameters are named as those of dist_llm's model, so that both start from the same values and must have the same loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_llm.config.model import ModelConfig


def norm_of(config: ModelConfig) -> nn.Module:
    """Return torch's own norm."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, heads, T, head] by tables [T, head / 2], halves of a head as the two coordinates."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention by scaled_dot_product_attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.head = config.hidden_size, config.head_width
        self.wq = nn.Linear(width, config.num_heads * self.head, bias=config.bias)
        self.wk = nn.Linear(width, config.kv_heads * self.head, bias=config.bias)
        self.wv = nn.Linear(width, config.kv_heads * self.head, bias=config.bias)
        self.wo = nn.Linear(config.num_heads * self.head, width, bias=config.bias)
        self.grouped = config.kv_heads != config.num_heads

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend over [B, T, D]."""
        batch, length, _ = x.shape
        query, key, value = (
            w(x).view(batch, length, -1, self.head).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        if tables is not None:
            query, key = rotate(query, *tables), rotate(key, *tables)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.gate = nn.Linear(width, inner, bias=config.bias) if config.activation == "swiglu" else None
        self.up = nn.Linear(width, inner, bias=config.bias)
        self.down = nn.Linear(inner, width, bias=config.bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """Map every token alone."""
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention and MLP with their residuals."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = norm_of(config), norm_of(config)
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), tables)
        return x + self.mlp(self.mlp_norm(x))


class PlainTransformer(nn.Module):
    """The whole model; called with targets it returns the mean loss, as DeepSpeed's and DDP's users write it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, learned = config.hidden_size, config.position == "learned"
        table = {"tokens": nn.Embedding(config.vocab_size, width)}
        if learned:
            table["positions"] = nn.Embedding(config.max_seq_len, width)
        self.embed = nn.ModuleDict(table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        projection = nn.Linear(width, config.vocab_size, bias=False)
        self.head = nn.ModuleDict({"norm": norm_of(config), "projection": projection})
        if config.tie_embeddings:
            projection.weight = self.embed["tokens"].weight
        if not learned:
            frequencies = config.rope.theta ** (-torch.arange(0, config.head_width, 2).double() / config.head_width)
            angles = torch.outer(torch.arange(config.max_seq_len).double(), frequencies)
            self.register_buffer("cos", angles.cos().float(), persistent=False)
            self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.learned = learned

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of targets [B, T]."""
        length = tokens.shape[1]
        x = self.embed["tokens"](tokens)
        if self.learned:
            x = x + self.embed["positions"].weight[:length]
        tables = None if self.learned else (self.cos[:length], self.sin[:length])
        for layer in self.layers:
            x = layer(x, tables)
        logits = self.head["projection"](self.head["norm"](x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
