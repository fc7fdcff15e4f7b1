"""Seconds of a matrix product from its shape: tiles that fill the device in waves, or the memory that it moves.

    seconds = max(waves x tile x (inner + RAMP) / rate(tile, alignment), bytes / bandwidth) + launch

The last wave costs as much as a full one, a short inner dim does not pay for filling and draining a tile, small tiles
reuse less, and rows that are no multiple of 16 bytes miss the matrix units. A product with few tiles may split its
inner dim and add up in memory. RAMP and the tiles' rates: fitted once to 183 shapes on an A100 (SimuMax).
"""

from __future__ import annotations

import math
from functools import lru_cache

from dist_llm.planner.cost.hardware import Device

RAMP = 130
"""Elements of the inner dim that take as long as filling and draining a tile."""

_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.87), (128, 64, 0.76), (64, 128, 0.76), (64, 64, 0.65))
"""Rows, columns and the part of the full rate that a tile of them reaches."""

_SPLITS = (1, 2, 4, 8)
_SHORTEST = 256

_ALIGNED = {8: 0.82, 16: 0.92, 32: 0.97, 64: 1.0}
"""Part of the full rate by the largest of these that divides inner dim and columns: 128-byte lines at 64."""


@lru_cache(maxsize=2**16)
def matmul_seconds(device: Device, rows: int, inner: int, columns: int, batch: int = 1) -> float:
    """Return the seconds of `batch` products of (rows, inner) by (inner, columns), in the compute format."""
    if not rows or not inner or not columns or not batch:
        return 0.0
    moved = batch * (rows * inner + inner * columns + rows * columns) * device.width / device.memory_bytes
    if device.units == 1:
        return max(2 * batch * rows * inner * columns / device.matmul_flops, moved) + device.kernel_seconds
    rate = device.matmul_flops * _ALIGNED[math.gcd(inner, columns, 64)] if _fits(device, inner, columns) else 0.0
    best = min(_tiled(device, (rows, inner, columns, batch), tile, rate or device.plain_flops) for tile in _TILES)
    return max(best, moved) + device.kernel_seconds


def _fits(device: Device, inner: int, columns: int) -> bool:
    """Return whether the matrix units take the rows: 16 bytes a step."""
    return math.gcd(inner, columns, 64) * device.width >= 16 and math.gcd(inner, columns, 64) >= 8


def _tiled(device: Device, shape: tuple[int, int, int, int], tile: tuple[int, int, float], rate: float) -> float:
    """Return the seconds with one size of tile, the inner dim split as is best."""
    rows, inner, columns, batch = shape
    high, wide, part = tile
    tiles = batch * -(-rows // high) * -(-columns // wide)
    best = math.inf
    for split in _SPLITS:
        depth = -(-inner // split)
        if split > 1 and depth < _SHORTEST:
            break
        waves = -(-tiles * split // device.units)
        seconds = 2 * waves * device.units * high * wide * (depth + RAMP) / (rate * part)
        if split > 1:
            seconds += 4 * split * batch * rows * columns / device.memory_bytes
        best = min(best, seconds)
    return best
