"""A layer of experts on a tape (models/moe.py, parallel/expert.py), its router taken as balanced."""

from __future__ import annotations

from collections.abc import Callable

from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.planner.native_ops import INDEX_BYTES, Operations
from dist_llm.planner.tape import Buffer, Gradients, Value

Activation = Callable[[Value, "Value | None"], Value]


def experts(ops: Operations, x: Value, model: ModelConfig, parallel: ParallelConfig, activate: Activation) -> Value:
    """Return the sum of what each token's experts make of it."""
    tape, moe, hidden = ops.tape, model.moe, model.hidden_size
    tokens = x.numel // hidden
    rows = tokens * moe.top_k
    weights = _route(ops, x, model)
    index = tape.new(rows * INDEX_BYTES * 2)
    sent = tape.apply([x], (rows * hidden, x.width), [rows * INDEX_BYTES], 0, x.size)
    if parallel.expert > 1:
        sent = tape.apply([sent], (sent.numel, sent.width))
        sent = tape.apply([sent], (sent.numel, sent.width), [rows * INDEX_BYTES], 0, sent.size)
    inner, here = model.expert_width // parallel.tensor, moe.num_experts // parallel.expert
    gate = _grouped(ops, sent, hidden, inner, here) if model.activation == "swiglu" else None
    up = _grouped(ops, sent, hidden, inner, here)
    product = activate(up, gate)
    del up, gate
    out = _grouped(ops, product, inner, hidden, here)
    del product
    if parallel.expert > 1:
        out = tape.apply([out], (out.numel, out.width), [rows * INDEX_BYTES], 0, out.size)
        out = tape.apply([out], (out.numel, out.width))
    weighed = tape.apply([out, weights], (out.numel, out.width), [out, weights], 0, out.size)
    del out, weights, index
    mixed = tape.apply([weighed], (x.numel, x.width), [weighed, rows * INDEX_BYTES], x.size)
    del sent, weighed
    return mixed


def _route(ops: Operations, x: Value, model: ModelConfig) -> Value:
    """Scores of all experts in the wide format, and the losses' share of them."""
    moe, hidden, wide = model.moe, model.hidden_size, ops.formats.wide
    tokens = x.numel // hidden
    scores = tokens * moe.num_experts
    if ops.formats.narrow:
        x = ops.tape.apply([x], (x.numel, wide))
    logits = ops.linear(x, hidden, moe.num_experts)
    logits.width = wide
    chosen = tokens * moe.top_k * (INDEX_BYTES + 2 * wide)
    one_hot = tokens * moe.top_k * moe.num_experts * INDEX_BYTES
    kept = 2 * scores * wide + chosen
    return ops.tape.apply([logits], (tokens * moe.top_k, wide), [kept], one_hot, 3 * scores * wide)


def _grouped(ops: Operations, x: Value, inputs: int, outputs: int, groups: int) -> Value:
    """One product a group, then all of them joined."""
    tape, width, size = ops.tape, x.width, x.size
    weight = groups * inputs * outputs * width
    made_of = (x.recipe or x.buffer) if tape.splits and tape.saving else None
    out = x.numel // inputs * outputs

    def backward(grad: Buffer | None) -> Gradients:
        made = tape.new(size)
        tape.meter.pass_through(size)
        tape.weight_gradient(weight, made_of, grad)
        return [made]

    return tape.apply([x], (out, width), [x], out * width, backward)
