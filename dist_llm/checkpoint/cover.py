r"""Do rectangles tile a tensor exactly once?

A rectangle's indicator function is fixed by its corners with alternating signs (its mixed difference):
    in 2-d, 1[a,b)x[c,d)  <->  +(a,c) -(a,d) -(b,c) +(b,d)
so rectangles R_i tile the box B if and only if the signed corners of all R_i add up to those of B: every inner corner
cancels. One pass over n rectangles, exact for any tiling, no pairwise overlap test. Dims that no rectangle splits are
left out, so the cost is n * 2^(split dims).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from dist_llm.errors import DistLLMError

MAX_DIMS = 8
MAX_CORNERS = 2**21

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, lengths) of a part of a tensor."""


class IncompleteStateError(DistLLMError):
    """The shards that the ranks offer do not make up the state: a bug of ours, so nothing is committed."""


def cover_problem(shape: tuple[int, ...], rectangles: Sequence[Rectangle]) -> str | None:
    """Say why non-empty rectangles do not cover `shape` exactly once; None when they do."""
    for offsets, lengths in rectangles:
        problem = rectangle_problem(shape, offsets, lengths)
        if problem:
            return problem
    if prod(shape) == 0:
        return None if not rectangles else f"shape {list(shape)} has no elements but {len(rectangles)} rectangles"
    split = [dim for dim, size in enumerate(shape) if any(lengths[dim] != size for _, lengths in rectangles)]
    if len(rectangles) << len(split) > MAX_CORNERS:
        return f"{len(rectangles)} rectangles split in {len(split)} dims are too many to check"
    corners = _signed_corners([((0,) * len(shape), shape)], split)
    for corner, sign in _signed_corners(rectangles, split).items():
        corners[corner] = corners.get(corner, 0) - sign
    if not any(corners.values()):
        return None
    covered = sum(prod(lengths) for _, lengths in rectangles)
    return f"{len(rectangles)} rectangles with {covered} elements do not cover shape {list(shape)} exactly once"


def rectangle_problem(shape: tuple[int, ...], offsets: tuple[int, ...], lengths: tuple[int, ...]) -> str | None:
    """Say why [offsets, offsets + lengths) is not a non-empty part of `shape`; None when it is."""
    if not len(shape) == len(offsets) == len(lengths):
        return f"offsets {list(offsets)} and lengths {list(lengths)} do not have the {len(shape)} dims of the tensor"
    if any(offset < 0 or length < 1 for offset, length in zip(offsets, lengths, strict=True)):
        return f"rectangle at {list(offsets)} of {list(lengths)} is empty or negative"
    if any(offset + length > size for offset, length, size in zip(offsets, lengths, shape, strict=True)):
        return f"rectangle at {list(offsets)} of {list(lengths)} reaches outside shape {list(shape)}"
    return None


def _signed_corners(rectangles: Sequence[Rectangle], dims: list[int]) -> dict[tuple[int, ...], int]:
    """Return the sum of signed corners, over `dims` only, without those that cancel."""
    corners: dict[tuple[int, ...], int] = {}
    choices = [(sum(choice) % 2, choice) for choice in product((0, 1), repeat=len(dims))]
    for offsets, lengths in rectangles:
        for odd, choice in choices:
            corner = tuple(
                offsets[dim] + lengths[dim] if upper else offsets[dim] for dim, upper in zip(dims, choice, strict=True)
            )
            total = corners.get(corner, 0) + (-1 if odd else 1)
            if total:
                corners[corner] = total
            else:
                del corners[corner]
    return corners
