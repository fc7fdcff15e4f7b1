"""The gate of a mixture of experts: s = softmax(z) or sigmoid(z), the k experts of largest s + bias, w: their s.

    w_j = scale s_j / S,   ds_j = scale (dw_j - sum_i dw_i s_i / S) / S,   S: sum of the chosen s (else 1, no sum)
    softmax: dz = s (ds - sum(ds s));   sigmoid: dz = ds s (1 - s)

A program gates a few tokens, all experts in registers, in fp32; of equal scores the first expert is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64
from torch import Tensor

from dist_llm.ops.triton.launch import on_device_of

_ELEMENTS = 1024
"""Scores that a program of four warps holds: 8 a thread."""


@dataclass(frozen=True)
class Gate:
    """How experts are chosen and weighed; sigmoid in place of softmax, weights of a token normalised to sum 1."""

    top_k: int
    sigmoid: bool
    normalize: bool
    scale: float


@triton.jit
@no_type_check
def _scores(logits, here, SIGMOID: tl.constexpr):
    z = tl.load(logits, mask=here, other=-float("inf"))
    if SIGMOID:
        score = tl.sigmoid(z)
    else:
        top = tl.max(z, 1)
        raised = tl.exp(z - tl.where(top == -float("inf"), 0.0, top)[:, None])
        score = raised / tl.maximum(tl.sum(raised, 1), 1e-30)[:, None]  # 0, not 0 / 0, where there is no token
    return score


@triton.jit
@no_type_check
def _forward(
    tensors,
    sizes,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Move 4 bytes a logit and 12 a choice: the least."""
    weights_out, chosen_out, logits, bias = tensors
    tokens, experts, scale = sizes
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)[None, :]
    here = (token < tokens)[:, None] & (expert < experts)
    score = _scores(logits + token[:, None] * tl.cast(experts, tl.int64) + expert, here, SIGMOID)
    ranked = tl.where(here, score + tl.load(bias + expert, mask=expert < experts, other=0.0), -float("inf"))
    divisor = tl.full([TOKENS], 1.0, tl.float32)
    if NORMALIZE:
        divisor = tl.zeros([TOKENS], tl.float32)
        unranked = ranked
        for _ in range(TOP_K):
            taken = expert == tl.argmax(unranked, 1)[:, None]
            divisor += tl.sum(tl.where(taken, score, 0.0), 1)
            unranked = tl.where(taken, -float("inf"), unranked)
    for choice in range(TOP_K):
        best = tl.argmax(ranked, 1)
        taken = expert == best[:, None]
        weight = tl.sum(tl.where(taken, score, 0.0), 1) / divisor * scale
        tl.store(weights_out + token * TOP_K + choice, weight, mask=token < tokens)
        tl.store(chosen_out + token * TOP_K + choice, best.to(tl.int64), mask=token < tokens)
        ranked = tl.where(taken, -float("inf"), ranked)


@triton.jit
@no_type_check
def _backward(
    tensors,
    sizes,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Move 8 bytes a logit (in and out) and 12 a choice: the least; the second reading of choices is from a cache."""
    grad_logits_out, grad_in, logits, chosen = tensors
    tokens, experts, scale = sizes
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)[None, :]
    here = (token < tokens)[:, None] & (expert < experts)
    place = token[:, None] * tl.cast(experts, tl.int64) + expert
    score = _scores(logits + place, here, SIGMOID)
    divisor = tl.full([TOKENS], 1.0, tl.float32)
    along = tl.zeros([TOKENS], tl.float32)
    if NORMALIZE:
        divisor = tl.zeros([TOKENS], tl.float32)
        for choice in range(TOP_K):
            taken = expert == tl.load(chosen + token * TOP_K + choice, mask=token < tokens, other=0)[:, None]
            of_choice = tl.sum(tl.where(taken, score, 0.0), 1)
            divisor += of_choice
            along += of_choice * tl.load(grad_in + token * TOP_K + choice, mask=token < tokens, other=0.0)
        divisor = tl.maximum(divisor, 1e-30)
        along = along / divisor
    slope = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for choice in range(TOP_K):
        taken = expert == tl.load(chosen + token * TOP_K + choice, mask=token < tokens, other=0)[:, None]
        grad = tl.load(grad_in + token * TOP_K + choice, mask=token < tokens, other=0.0)
        slope = tl.where(taken, ((grad - along) / divisor * scale)[:, None], slope)
    if SIGMOID:
        slope = slope * score * (1.0 - score)
    else:
        slope = score * (slope - tl.sum(slope * score, 1)[:, None])
    tl.store(grad_logits_out + place, slope, mask=here)


def _tile(experts: int) -> tuple[int, int]:
    """Return how many tokens and experts a program holds. Raises ValueError where experts do not fit."""
    if experts > _ELEMENTS:
        raise ValueError(f"triton gates up to {_ELEMENTS} experts, not {experts}")
    block: int = triton.next_power_of_2(experts)
    return _ELEMENTS // block, block


def top_k_gate(
    logits: Float32[Tensor, "tokens experts"], bias: Float32[Tensor, " experts"], gate: Gate
) -> tuple[Float32[Tensor, "tokens top_k"], Int64[Tensor, "tokens top_k"]]:
    """Return the weights and indices of each token's experts, the best first; bias: added to choose, not to weigh."""
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty((num_tokens, gate.top_k))
    chosen = logits.new_empty((num_tokens, gate.top_k), dtype=torch.int64)
    tokens, experts = _tile(num_experts)
    if num_tokens:
        tensors, sizes = (weights, chosen, logits.contiguous(), bias), (num_tokens, num_experts, gate.scale)
        flags = (gate.top_k, gate.sigmoid, gate.normalize)
        with on_device_of(logits):
            _forward[(triton.cdiv(num_tokens, tokens),)](tensors, sizes, *flags, tokens, experts, num_warps=4)
    return weights, chosen


def top_k_gate_backward(
    grad: Float32[Tensor, "tokens top_k"],
    logits: Float32[Tensor, "tokens experts"],
    chosen: Int64[Tensor, "tokens top_k"],
    gate: Gate,
) -> Float32[Tensor, "tokens experts"]:
    """Return the gradient of the logits; grad: of the weights."""
    num_tokens, num_experts = logits.shape
    logits, grad_logits = logits.contiguous(), logits.new_empty(logits.shape)
    tokens, experts = _tile(num_experts)
    if num_tokens:
        tensors = (grad_logits, grad.contiguous(), logits, chosen.contiguous())
        sizes, flags = (num_tokens, num_experts, gate.scale), (gate.top_k, gate.sigmoid, gate.normalize)
        with on_device_of(logits):
            _backward[(triton.cdiv(num_tokens, tokens),)](tensors, sizes, *flags, tokens, experts, num_warps=4)
    return grad_logits
