"""Attention over context ranks on a tape (parallel/context.py, parallel/ring.py), and plain attention on one rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dist_llm.config.parallel import ParallelConfig
from dist_llm.planner.native_ops import Operations
from dist_llm.planner.tape import Value

if TYPE_CHECKING:
    from dist_llm.planner.native_model import Share

Attended = tuple[Value, Value, Value]
"""Queries, keys and values."""


def attend_over_ranks(ops: Operations, qkv: Attended, parallel: ParallelConfig, share: Share, head: int) -> Value:
    """Return the output of attention with the tokens of all context ranks."""
    ranks, together = parallel.context, parallel.head_ranks if parallel.context > 1 else 1
    if together > 1:
        return _ulysses(ops, qkv, parallel, share, head)
    return _attend(ops, qkv, ranks, share, head)


def _attend(ops: Operations, qkv: Attended, ring: int, share: Share, head: int) -> Value:
    query, key, value = qkv
    rows = query.numel // head
    queries = rows and query.numel // head
    if ring > 1:
        return _ring(ops, qkv, rows)
    tokens = share.seq
    mask = share.batch * tokens * tokens * ops.formats.compute if share.documents else 0
    return ops.attend(query, key, value, queries, mask)


def _ring(ops: Operations, qkv: Attended, rows: int) -> Value:
    """A pair of keys and values here and one that comes; sums in the wide format."""
    query, key, value = qkv
    pair, wide = key.size + value.size, ops.formats.wide
    sums, wide_pair = query.numel * wide, (key.numel + value.numel) * wide
    out_bytes = sums if ops.formats.narrow else 0
    forward = 2 * pair + out_bytes + query.size // 2 + 2 * sums // 2
    back = 2 * pair + sums + 3 * wide_pair + query.size + pair
    made = query.size + pair
    out = ops.tape.apply(
        [query, key, value], (query.numel, query.width), [query, key, value, rows * wide], forward, max(0, back - made)
    )
    if ops.tape.saving and out.buffer is not None:
        out.node.keeps.append(out.buffer)
    return out


def _ulysses(ops: Operations, qkv: Attended, parallel: ParallelConfig, share: Share, head: int) -> Value:
    """All tokens of some heads: queries, keys and values travel together, and the output back."""
    query, key, value = qkv
    together = parallel.head_ranks
    rows = share.batch * share.seq * head
    copies = math.lcm(key.numel // rows, together) // (key.numel // rows)
    repeated = [ops.tape.apply([x], (x.numel * copies, x.width)) if copies > 1 else x for x in (key, value)]
    key, value = repeated
    total = query.numel + key.numel + value.numel
    joined = ops.tape.apply([query, key, value], (total, query.width))
    came = ops.tape.apply([joined], (total, query.width))
    del joined
    whole = ops.tape.apply([came], (total, query.width), (), total * query.width)
    del came
    parts = [
        ops.tape.record(Value(whole.buffer, x.numel, x.width, whole.node), [whole], ()) for x in (query, key, value)
    ]
    sizes = parallel.context // together
    del whole
    out = _attend(ops, (parts[0], parts[1], parts[2]), sizes, share, head)
    del parts
    ordered = ops.tape.apply([out], (out.numel, out.width), (), out.size)
    del out
    return ops.tape.apply([ordered], (ordered.numel, ordered.width), (), ordered.size)
