"""Traffic of what a block does beside products and attention, in elements moved, reads and writes counted.

    tokens x hidden, over tp only with sequence      forward              backward
      two norms                                      2 x (1 + 1)          2 x (2 + 1)
      two residual sums, with bias and dropout       2 x (2 + 1 + mask)   2 x (2 + 1), dropout 2 x (2 + mask), biases 2
    over tp
      queries, keys, values laid out; the result     2 x q k v, 2 x own   3 x q k v, 2 x own
      activation, over the inner features            2 (gated 3)          4 (gated 5)

Masks are a byte an element.
"""

from __future__ import annotations

from dist_llm.planner.cost.hardware import Device
from dist_llm.planner.cost.shape import Shape

NORM_KERNELS, ACTIVATION_KERNELS = 2, 1


def _unsplit(shape: Shape, elements: float, masks: float = 0.0) -> float:
    """Return the bytes of so many elements, and masks, for each element of the hidden states."""
    mask = masks if shape.dropout else 0.0
    return shape.tokens * shape.hidden * (elements * shape.width + mask) / shape.spread


def norm_seconds(device: Device, shape: Shape) -> tuple[float, float]:
    """Return forward and backward of a block's two norms."""
    return device.moved(_unsplit(shape, 4), NORM_KERNELS), device.moved(_unsplit(shape, 6), 2 * NORM_KERNELS)


def residual_seconds(device: Device, shape: Shape) -> tuple[float, float]:
    """Return forward and backward of a block's two residual sums, with bias and dropout."""
    dropped = 4 if shape.dropout else 0
    biases = 2 if shape.biased else 0
    forward = device.moved(_unsplit(shape, 6, 2), 2)
    return forward, device.moved(_unsplit(shape, 6 + dropped + biases, 2), 4)


def layout_seconds(device: Device, shape: Shape) -> tuple[float, float]:
    """Return forward and backward of laying out queries, keys and values for attention, and its result."""
    own = shape.heads * shape.head_width
    three = own + 2 * shape.kv_heads * shape.head_width
    forward = shape.tokens * shape.width * (2 * three + 2 * own)
    return device.moved(forward, 2), device.moved(shape.tokens * shape.width * (3 * three + 2 * own), 2)


def activation_seconds(device: Device, shape: Shape, tokens: float, inner: float) -> tuple[float, float]:
    """Return forward and backward of the activation over `inner` features of `tokens` tokens."""
    moved = tokens * inner * shape.width
    ways = (3, 5) if shape.gated else (2, 4)
    return device.moved(ways[0] * moved, ACTIVATION_KERNELS), device.moved(ways[1] * moved, 2 * ACTIVATION_KERNELS)


def accumulation_seconds(device: Device, shape: Shape, weights: float) -> float:
    """Return the seconds of adding gradients of `weights` elements to their sums over microbatches."""
    return device.moved(weights * shape.sum_bytes, 0)
