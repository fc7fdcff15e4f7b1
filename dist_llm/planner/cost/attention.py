"""Seconds of scores, softmax and values: in one kernel that keeps scores on the chip, or written to memory.

    fused     4 x pairs x width FLOPs forward, 2.5 times that backward (Dao 2023), at a part of the products' rate
    written   two products forward, four backward, and over every pair of a square mask the traffic of softmax (half
              of what it reads is masked) and of dropout

Fused rates: FlashAttention-2 on A100 and H100 lies between a third and two thirds of a large product's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.planner.cost.hardware import Device
from dist_llm.planner.cost.matmul import matmul_seconds

_FORWARD, _BACKWARD = 0.56, 0.44
_NARROW = 0.8
"""What heads narrower than 128 reach of that."""
_RAMP = 300
"""Keys that take as long as starting and ending a row of blocks."""


@dataclass(frozen=True)
class Scores:
    """One rank's attention: sequences, heads, queries of this rank, keys of the whole sequence, width of a head."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    dropout: bool = False


@lru_cache(maxsize=2**14)
def fused_seconds(device: Device, scores: Scores) -> tuple[float, float]:
    """Return the seconds of forward and backward in one kernel; a causal mask halves the pairs."""
    pairs = scores.batch * scores.heads * scores.queries * (scores.keys + 1) / 2
    rate = device.matmul_flops * scores.keys / (scores.keys + _RAMP)
    rate *= 1.0 if scores.width >= 128 else _NARROW
    flops = 4 * pairs * scores.width
    forward = flops / (rate * _FORWARD) + device.kernel_seconds
    return forward, 2.5 * flops / (rate * _BACKWARD) + 3 * device.kernel_seconds


@lru_cache(maxsize=2**14)
def written_seconds(device: Device, scores: Scores) -> tuple[float, float]:
    """Return the seconds of forward and backward with scores in memory."""
    batch, pairs = scores.batch * scores.heads, scores.batch * scores.heads * scores.queries * scores.keys
    queries, keys, width = scores.queries, scores.keys, scores.width
    inner = matmul_seconds(device, queries, width, keys, batch)
    outer = matmul_seconds(device, queries, keys, width, batch)
    forward = inner + outer + device.moved(pairs * 1.5 * device.width)
    backward = inner + 3 * outer + device.moved(pairs * 2 * device.width)
    if scores.dropout:
        dropped = device.moved(pairs * (2 * device.width + 1))
        return forward + dropped, backward + dropped
    return forward, backward
