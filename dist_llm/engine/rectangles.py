"""Flat ranges of stored tensors as rectangles of logical ones: how other engines' optimizer state meets checkpoints.

    [ . . a a ]   DeepSpeed and Megatron-Core shard flat buffers, so a rank may hold elements 2 to 9 of a matrix:
    [ b b b b ]   part of a row (a), whole rows (b), part of a row (c). Three rectangles, each a view of the buffer.
    [ c c . . ]

A stored tensor is made of bands, each a part of one logical tensor (a fused QKV matrix has three for each head group).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from dist_llm.types import TensorShard


@dataclass(frozen=True)
class Band:
    """A run of a stored tensor's elements, from `begin` on: `sizes` of them at `offsets` of a logical tensor."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int = 0


@dataclass(frozen=True)
class Rectangle:
    """`sizes` elements at `offsets` of a tensor, the first of them `begin` elements into a flat range of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Yield the fewest rectangles that make up elements [start, stop) of a row-major tensor, in order."""
    if start >= stop:
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if len(shape) > 1 and first == last and stop - start < row:
        yield from _in_row(shape, first, start - first * row, stop - first * row, 0)
        return
    whole, end = -(-start // row), stop // row
    if whole * row > start:
        yield from _in_row(shape, first, start - first * row, row, 0)
    if end > whole:
        yield Rectangle((whole, *(0,) * (len(shape) - 1)), (end - whole, *shape[1:]), whole * row - start)
    if end * row < stop:
        yield from _in_row(shape, end, 0, stop - end * row, end * row - start)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int, begin: int) -> Iterator[Rectangle]:
    """Yield the rectangles of a part of row `index`, which begins at `begin` of the range."""
    for inner in rectangles(shape[1:], start, stop):
        yield Rectangle((index, *inner.offsets), (1, *inner.sizes), begin + inner.begin)


def band_shards(kind: str, flat: Tensor, start: int, bands: Sequence[Band], primary: bool) -> Iterator[TensorShard]:
    """Yield what elements [start, start + len(flat)) of a stored tensor are of logical tensors.

    The shards are views of `flat`, so a load writes there; what lies past a logical shape (padding) is left out.
    kind: `model`, `optimizer.exp_avg` or `optimizer.exp_avg_sq`. primary: this rank is the one that saves them.
    """
    for band in bands:
        low = max(start, band.begin)
        high = min(start + flat.numel(), band.begin + math.prod(band.sizes))
        for rect in rectangles(band.sizes, low - band.begin, high - band.begin):
            view = flat.narrow(0, low - start + rect.begin, math.prod(rect.sizes)).view(rect.sizes)
            offsets = tuple(at + more for at, more in zip(band.offsets, rect.offsets, strict=True))
            for dim, (at, limit) in enumerate(zip(offsets, band.shape, strict=True)):
                view = view.narrow(dim, 0, max(0, min(view.shape[dim], limit - at)))
            if view.numel():
                yield TensorShard(f"{kind}.{band.name}", band.shape, offsets, view, primary)
