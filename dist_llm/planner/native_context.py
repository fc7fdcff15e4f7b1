"""Attention on a tape: of one rank, over a ring of ranks (parallel/ring.py) and by heads (parallel/context.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_llm.config.parallel import ParallelConfig
from dist_llm.planner.native_ops import Operations
from dist_llm.planner.tape import Value


@dataclass(frozen=True)
class AttentionShape:
    """Sequences, tokens of each on this rank, width of a head, ranks of a ring and ranks that exchange heads.

    documents: there is a mask of whole sequences.
    """

    batch: int
    seq: int
    head: int
    ring: int
    together: int
    documents: bool


def attention_shape(parallel: ParallelConfig, batch: int, seq: int, head: int, documents: bool) -> AttentionShape:
    """Return the shape under a layout."""
    together = parallel.head_ranks if parallel.context > 1 else 1
    return AttentionShape(batch, seq, head, parallel.context // together, together, documents)


def attend_over_ranks(ops: Operations, qkv: tuple[Value, Value, Value], shape: AttentionShape) -> Value:
    """Return the output of attention to the tokens of all context ranks."""
    return _by_heads(ops, qkv, shape) if shape.together > 1 else _attend(ops, qkv, shape)


def _attend(ops: Operations, qkv: tuple[Value, Value, Value], shape: AttentionShape) -> Value:
    query, key, value = qkv
    rows = query.numel // shape.head
    if shape.ring > 1:
        return _ring(ops, qkv, rows)
    seq = shape.seq * shape.together
    mask = shape.batch * seq * seq * ops.formats.compute if shape.documents else 0
    return ops.attend(query, key, value, rows, mask)


def _ring(ops: Operations, qkv: tuple[Value, Value, Value], rows: int) -> Value:
    """Two pairs of keys and values, the one here and the one that comes, and sums in the wide format.

    The backward has three pairs of gradients beside them: summed here, sent and received.
    """
    query, key, value = qkv
    wide, pair = ops.formats.wide, key.size + value.size
    sums, wide_pair = query.numel * wide, (key.numel + value.numel) * wide
    forward = 2 * pair + (sums if ops.formats.narrow else 0) + query.size // 2 + sums
    back = 2 * pair + sums + 3 * wide_pair + query.size + pair
    given = query.size + pair
    kept: list[Value | int] = [query, key, value, rows * wide]
    out = ops.tape.apply([query, key, value], (query.numel, query.width), kept, forward, max(0, back - given))
    ops.keep_output(out)
    return out


def _by_heads(ops: Operations, qkv: tuple[Value, Value, Value], shape: AttentionShape) -> Value:
    """All tokens of some heads: queries, keys and values travel together, and the output back."""
    tape, (query, key, value) = ops.tape, qkv
    groups = key.numel // (shape.batch * shape.seq * shape.head)
    copies = math.lcm(groups, shape.together) // groups
    if copies > 1:
        key, value = (tape.apply([x], (x.numel * copies, x.width)) for x in (key, value))
    numel, width = query.numel + key.numel + value.numel, query.width
    joined = tape.apply([query, key, value], (numel, width))
    came = tape.apply([joined], (numel, width))
    del joined
    whole = tape.apply([came], (numel, width), (), numel * width)
    del came
    mine = [tape.record(Value(whole.buffer, x.numel, width, whole.node), [whole], ()) for x in (query, key, value)]
    del whole, qkv, query, key, value
    out = _attend(ops, (mine[0], mine[1], mine[2]), shape)
    del mine
    ordered = tape.apply([out], (out.numel, width), (), out.size)
    del out
    return tape.apply([ordered], (ordered.numel, width), (), ordered.size)
