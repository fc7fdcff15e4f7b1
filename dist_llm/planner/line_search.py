"""The lowest point of a function of one variable: a grid finds the valley, golden sections its bottom (Kiefer 1953)."""

from __future__ import annotations

import math
from collections.abc import Callable

GRID = 64
"""Points at which the function is first looked at."""
_GOLDEN = (math.sqrt(5) - 1) / 2


def lowest(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-10) -> float:
    """Return where `function` is least between low and high, to `tolerance` of their distance."""
    points = [low + (high - low) * index / GRID for index in range(GRID + 1)]
    bottom = min(range(GRID + 1), key=lambda index: function(points[index]))
    left, right = points[max(0, bottom - 1)], points[min(GRID, bottom + 1)]
    smallest = tolerance * (high - low)
    first, second = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    at_first, at_second = function(first), function(second)
    while right - left > smallest:
        if at_first <= at_second:
            right, second, at_second = second, first, at_first
            first = right - _GOLDEN * (right - left)
            at_first = function(first)
        else:
            left, first, at_first = first, second, at_second
            second = left + _GOLDEN * (right - left)
            at_second = function(second)
    return (left + right) / 2
