"""The parameters of the transformer as data: logical name, shape, and the dim that tensor parallelism splits.

Shapes are layout-free; `padded_vocab` is the only padding there is: rows of the two vocabulary tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dist_llm.config.model import ModelConfig

VOCAB_ALIGNMENT = 8
"""Rows of a rank's share of the vocabulary are a multiple of this (matrix units work on tiles of 8)."""


@dataclass(frozen=True)
class ParamSpec:
    """One logical parameter; split_dim is the dim split over tp, None when every tp rank holds it whole.

    expert: the matrices of all experts of a layer; dim 0 is split over ep.
    """

    name: str
    shape: tuple[int, ...]
    split_dim: int | None = None
    vocabulary: bool = False
    expert: bool = False

    @property
    def numel(self) -> int:
        """Number of elements, padding not counted."""
        return math.prod(self.shape)

    def local_shape(self, tensor: int, expert: int = 1) -> tuple[int, ...]:
        """Return the shape on one of `tensor` tp ranks and `expert` ep ranks, vocabulary padding included."""
        shape = list(self.shape)
        if self.vocabulary:
            shape[0] = padded_vocab(shape[0], tensor)
        if self.split_dim is not None:
            shape[self.split_dim] //= tensor
        if self.expert:
            shape[0] //= expert
        return tuple(shape)


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Return the rows that the vocabulary tables have in all under `tensor` tp ranks."""
    multiple = VOCAB_ALIGNMENT * tensor
    return -(-vocab_size // multiple) * multiple


def _linear(name: str, rows: int, columns: int, split_dim: int, bias: bool) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", (rows, columns), split_dim)
    if bias:
        yield ParamSpec(f"{name}.bias", (rows,), 0 if split_dim == 0 else None)


def _norm(model: ModelConfig, name: str) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", (model.hidden_size,))
    if model.norm == "layernorm" and model.bias:
        yield ParamSpec(f"{name}.bias", (model.hidden_size,))


def embedding_parameters(model: ModelConfig) -> Iterator[ParamSpec]:
    """Yield the token table and, when positions are learned, the position table."""
    yield ParamSpec("embed.tokens.weight", (model.vocab_size, model.hidden_size), 0, vocabulary=True)
    if model.position == "learned":
        yield ParamSpec("embed.positions.weight", (model.max_seq_len, model.hidden_size))


def _mlp(model: ModelConfig, name: str, inner: int, bias: bool) -> Iterator[ParamSpec]:
    if model.activation == "swiglu":
        yield from _linear(f"{name}.gate", inner, model.hidden_size, 0, bias)
    yield from _linear(f"{name}.up", inner, model.hidden_size, 0, bias)
    yield from _linear(f"{name}.down", model.hidden_size, inner, 1, bias)


def _moe(model: ModelConfig, name: str) -> Iterator[ParamSpec]:
    experts, width, inner = model.moe.num_experts, model.hidden_size, model.expert_width
    yield ParamSpec(f"{name}.router.weight", (experts, width))
    for part in ("gate", "up") if model.activation == "swiglu" else ("up",):
        yield ParamSpec(f"{name}.experts.{part}.weight", (experts, inner, width), 1, expert=True)
    yield ParamSpec(f"{name}.experts.down.weight", (experts, width, inner), 2, expert=True)
    if model.moe.num_shared:
        yield from _mlp(model, f"{name}.shared", model.moe.num_shared * inner, bias=False)


def layer_parameters(model: ModelConfig, index: int) -> Iterator[ParamSpec]:
    """Yield the parameters of one block, in the order in which the module holds them."""
    prefix, width, head, bias = f"layers.{index}", model.hidden_size, model.head_width, model.bias
    yield from _linear(f"{prefix}.attention.wq", model.num_heads * head, width, 0, bias)
    yield from _linear(f"{prefix}.attention.wk", model.kv_heads * head, width, 0, bias)
    yield from _linear(f"{prefix}.attention.wv", model.kv_heads * head, width, 0, bias)
    yield from _linear(f"{prefix}.attention.wo", width, model.num_heads * head, 1, bias)
    if model.qk_norm:
        yield ParamSpec(f"{prefix}.attention.q_norm.weight", (head,))
        yield ParamSpec(f"{prefix}.attention.k_norm.weight", (head,))
    if model.has_experts(index):
        yield from _moe(model, f"{prefix}.mlp")
    else:
        yield from _mlp(model, f"{prefix}.mlp", model.ffn_hidden_size, bias)
    yield from _norm(model, f"{prefix}.attention_norm")
    yield from _norm(model, f"{prefix}.mlp_norm")


def head_parameters(model: ModelConfig) -> Iterator[ParamSpec]:
    """Yield the final norm (pre-norm models) and the output projection, tied or not."""
    if model.norm_placement == "pre":
        yield from _norm(model, "head.norm")
    yield ParamSpec("head.projection.weight", (model.vocab_size, model.hidden_size), 0, vocabulary=True)


def list_parameters(model: ModelConfig) -> list[ParamSpec]:
    """Return every logical parameter once; a tied projection is the token table and not listed."""
    specs = list(embedding_parameters(model))
    for index in range(model.num_layers):
        specs.extend(layer_parameters(model, index))
    specs.extend(head_parameters(model))
    return [spec for spec in specs if not (model.tie_embeddings and spec.name == "head.projection.weight")]


def num_parameters(model: ModelConfig) -> int:
    """Return the number of trained parameters, embeddings included, padding not."""
    return sum(spec.numel for spec in list_parameters(model))
