"""Seconds of one block on one rank for one microbatch: forward, backward (inputs and weights), and again.

tp   each of two regions begins or ends with a collective of the hidden states: 2 all-reduces each way, or under
     sequence parallelism 2 all-gathers and 2 reduce-scatters each way
cp   ring: keys and values go round beside attention; exchange of heads: 2 all-to-alls each way
ep   rows go to their experts and back: 2 all-to-alls each way
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from dist_llm.planner.cost import memory_bound
from dist_llm.planner.cost.attention import Scores, fused_seconds, written_seconds
from dist_llm.planner.cost.collectives import all_reduce_seconds, gather_seconds, group_of, send_seconds
from dist_llm.planner.cost.hardware import Device, Fabric
from dist_llm.planner.cost.matmul import matmul_seconds
from dist_llm.planner.cost.seconds import Passes, Seconds
from dist_llm.planner.cost.shape import Shape

_FORWARD_OPERATIONS, _BACKWARD_OPERATIONS = 27, 50
"""Operations of a block that the host issues one by one (Megatron-LM's GPT block, eager)."""
_COMPILED = 0.5
"""What is left of them where a compiler fuses the element-wise ones."""
_UNTRACKED = 0.6
"""What a forward costs the host whose graph is not kept, because it is recomputed."""
_MEETING = 0.8
"""Host time of a collective for each rank of its group, in operations: the last to come is later the more there are."""


@dataclass(frozen=True)
class _Products:
    """Forward and backward seconds of products, and their weights."""

    forward: float = 0.0
    backward: float = 0.0
    weights: float = 0.0

    def __add__(self, other: _Products) -> _Products:
        return _Products(self.forward + other.forward, self.backward + other.backward, self.weights + other.weights)


def _product(device: Device, rows: int, inner: int, columns: int, batch: int = 1) -> _Products:
    backward = matmul_seconds(device, rows, columns, inner, batch) + matmul_seconds(device, inner, rows, columns, batch)
    return _Products(matmul_seconds(device, rows, inner, columns, batch), backward, batch * inner * columns)


@lru_cache(maxsize=2**14)
def layer_passes(device: Device, fabric: Fabric, shape: Shape, has_experts: bool) -> Passes:
    """Return the seconds of one block."""
    attention = _attention(device, fabric, shape)
    feed_forward = (_experts if has_experts else _dense)(device, fabric, shape)
    norm, norm_back = memory_bound.norm_seconds(device, shape)
    residual, residual_back = memory_bound.residual_seconds(device, shape)
    rest = Passes(Seconds(memory_bound=norm + residual), Seconds(memory_bound=norm_back + residual_back))
    whole = attention + feed_forward + rest + _regions(device, fabric, shape) + _host(device, shape)
    if shape.full:
        untracked = replace(whole.forward, host=whole.forward.host * _UNTRACKED)
        return Passes(untracked, whole.backward, again=whole.forward + _last_sum(fabric, shape) * -1.0)
    if not shape.again:
        return whole
    again = Seconds()
    if "core_attn" in shape.again:
        again += Seconds(
            attention=attention.forward.attention,
            context_comm=attention.forward.context_comm,
            host=4 * device.dispatch_seconds,
        )
    if "norm" in shape.again:
        again += Seconds(memory_bound=norm, host=2 * device.dispatch_seconds)
    if "mlp" in shape.again:
        again += feed_forward.forward
    elif "activation" in shape.again:
        seconds = memory_bound.activation_seconds(device, shape, shape.tokens, shape.inner / shape.tensor)[0]
        again += Seconds(memory_bound=seconds, host=device.dispatch_seconds)
    return replace(whole, again=again)


def _attention(device: Device, fabric: Fabric, shape: Shape) -> Passes:
    """Return projections, attention itself and what context ranks exchange for it."""
    own, pair = shape.heads * shape.head_width, 2 * shape.kv_heads * shape.head_width
    products = _product(device, shape.tokens, shape.hidden, own + pair)
    products += _product(device, shape.tokens, own, shape.hidden)
    ring = shape.context // shape.head_ranks
    scores = Scores(
        shape.microbatch,
        max(1, shape.heads // shape.head_ranks),
        shape.seq_len // ring,
        shape.seq_len,
        shape.head_width,
        shape.attention_dropout,
    )
    inside = (written_seconds if shape.written else fused_seconds)(device, scores)
    laid, laid_back = memory_bound.layout_seconds(device, shape)
    added = memory_bound.accumulation_seconds(device, shape, products.weights)
    sent = _context(fabric, shape, ring, inside)
    return Passes(
        Seconds(products.forward, inside[0], laid, context_comm=sent[0]),
        Seconds(products.backward, inside[1], laid_back + added, context_comm=sent[1]),
    )


def _context(fabric: Fabric, shape: Shape, ring: int, inside: tuple[float, float]) -> tuple[float, float]:
    """Return what is not hidden of the exchange of keys, values and heads, forward and backward."""
    if shape.context == 1:
        return 0.0, 0.0
    own = shape.tokens * shape.heads * shape.head_width * shape.width
    pair = shape.tokens * 2 * shape.kv_heads * shape.head_width * shape.width
    swapped = 0.0
    if shape.head_ranks > 1:
        group = group_of(fabric, shape.head_ranks, shape.tensor * ring)
        swapped = gather_seconds(fabric, group, own + pair) + gather_seconds(fabric, group, own)
    if ring == 1:
        return swapped, swapped
    crosses = shape.tensor * ring > fabric.devices_per_node
    hop = send_seconds(fabric, crosses, pair)
    wide = send_seconds(fabric, crosses, pair * shape.master_width / shape.width)
    forward = max(0.0, (ring - 1) * hop - inside[0] * (ring - 1) / ring)
    backward = max(0.0, (ring - 1) * hop + ring * wide - inside[1] * (ring - 1) / ring)
    return swapped + forward, swapped + backward


def _dense(device: Device, fabric: Fabric, shape: Shape) -> Passes:
    """Return the feed-forward layer."""
    return _mlp(device, shape, shape.tokens, shape.inner // shape.tensor)


def _mlp(device: Device, shape: Shape, tokens: int, inner: int, batch: int = 1) -> Passes:
    """Return `batch` feed-forward layers of `inner` features over `tokens` tokens each."""
    products = _product(device, tokens, shape.hidden, inner * (2 if shape.gated else 1), batch)
    products += _product(device, tokens, inner, shape.hidden, batch)
    moved, moved_back = memory_bound.activation_seconds(device, shape, tokens * batch, inner)
    added = memory_bound.accumulation_seconds(device, shape, products.weights)
    return Passes(
        Seconds(products.forward, memory_bound=moved), Seconds(products.backward, memory_bound=moved_back + added)
    )


def _experts(device: Device, fabric: Fabric, shape: Shape) -> Passes:
    """Return a layer of experts, evenly used: the router, the exchange of rows, the experts, and the shared one."""
    rows = shape.tokens * shape.top_k
    local = max(1, shape.experts // shape.expert_ranks)
    each = max(1, rows * shape.expert_ranks // shape.experts)
    routed = _mlp(device, shape, each, shape.expert_inner // shape.tensor, local)
    router = _product(device, shape.tokens, shape.hidden, shape.experts)
    moved = device.moved(rows * shape.hidden * shape.width * 4 + shape.tokens * shape.experts * 12, 12)
    group = group_of(fabric, shape.expert_ranks, shape.tensor)
    sent = 2 * gather_seconds(fabric, group, rows * shape.hidden * shape.width)
    host = 20 * device.dispatch_seconds
    parts = routed + Passes(
        Seconds(router.forward, memory_bound=moved, expert_comm=sent, host=host),
        Seconds(router.backward, memory_bound=moved, expert_comm=sent, host=2 * host),
    )
    if not shape.shared_experts:
        return parts
    inner = shape.shared_experts * shape.expert_inner // shape.tensor
    return parts + _mlp(device, shape, shape.tokens, inner)


def _regions(device: Device, fabric: Fabric, shape: Shape) -> Passes:
    """Return the collectives around the two regions that tensor ranks split."""
    if shape.tensor == 1:
        return Passes()
    group = group_of(fabric, shape.tensor, 1)
    if shape.sequence:
        one = gather_seconds(fabric, group, shape.hidden_bytes)
        forward = backward = 4 * one
        if shape.async_tensor and device.host_ahead:
            forward = backward = forward / shape.tensor
    else:
        forward = backward = 2 * all_reduce_seconds(fabric, group, shape.hidden_bytes)
    met = (2 if not shape.sequence else 4) * _MEETING * shape.tensor * device.dispatch_seconds
    return Passes(Seconds(tensor_comm=forward, host=met), Seconds(tensor_comm=backward, host=met))


def _last_sum(fabric: Fabric, shape: Shape) -> Seconds:
    """Return the sum over tensor ranks that ends a block where recompute leaves it out: nothing after it is kept."""
    if shape.ends_again or shape.tensor == 1:
        return Seconds()
    group = group_of(fabric, shape.tensor, 1)
    last = gather_seconds if shape.sequence else all_reduce_seconds
    return Seconds(tensor_comm=last(fabric, group, shape.hidden_bytes))


def _host(device: Device, shape: Shape) -> Passes:
    """Return the host's time to issue a block."""
    part = device.dispatch_seconds * (_COMPILED if shape.compiled else 1.0)
    return Passes(Seconds(host=_FORWARD_OPERATIONS * part), Seconds(host=_BACKWARD_OPERATIONS * part))
