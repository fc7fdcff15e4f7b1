"""AdamW (Loshchilov & Hutter 2019) of a flat shard in one pass: clip, unscale, update, and round to a narrow copy.

    g <- factor grad;  m, v <- moments of g;  w <- w (1 - lr decay) - lr m^ / (sqrt(v^) + eps)

What changes from step to step is read from the device, so that no step waits for the host, compiles anew or is wrong
when replayed from a CUDA graph. Master weights and moments are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from dist_llm.ops.triton.launch import FLAT_BLOCK, FLAT_WARPS, check_formats, flat_grid, on_device_of

SCALARS = ("clip", "inverse_scale", "lr", "correction1", "correction2", "skip")
"""What the kernel reads: coefficients of clipping and loss scale, learning rate, 1 / (1 - beta^t), and whether (not 0)
nothing is to be updated, as after an overflow."""


@dataclass(frozen=True)
class Rule:
    """What stays the same over a run."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@triton.jit
@no_type_check
def _update(state, grad_in, narrow_out, scalars, rule, count, BLOCK: tl.constexpr):
    """Move 24 bytes of state, B of the gradient and B of the narrow copy for a weight: the least."""
    weight_in, first_in, second_in = state
    beta1, beta2, eps, weight_decay = rule
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < tl.where(tl.load(scalars + 5) == 0.0, count, 0)
    lr = tl.load(scalars + 2)
    grad = tl.load(grad_in + place, mask=here, other=0.0).to(tl.float32)
    grad *= tl.load(scalars) * tl.load(scalars + 1)
    first = beta1 * tl.load(first_in + place, mask=here, other=0.0) + (1.0 - beta1) * grad
    second = beta2 * tl.load(second_in + place, mask=here, other=0.0) + (1.0 - beta2) * grad * grad
    step = first * tl.load(scalars + 3) / (tl.sqrt(second * tl.load(scalars + 4)) + eps)
    weight = tl.load(weight_in + place, mask=here, other=0.0) * (1.0 - lr * weight_decay) - lr * step
    tl.store(weight_in + place, weight, mask=here)
    tl.store(first_in + place, first, mask=here)
    tl.store(second_in + place, second, mask=here)
    if narrow_out is not None:
        tl.store(narrow_out + place, weight.to(narrow_out.dtype.element_ty), mask=here)


def adamw_flat_(
    weight: Float32[Tensor, " count"],
    moments: tuple[Float32[Tensor, " count"], Float32[Tensor, " count"]],
    grad: Float[Tensor, " count"],
    narrow: Float[Tensor, " count"] | None,
    scalars: Float32[Tensor, " numbers"],
    rule: Rule,
) -> None:
    """Update the weights and both moments in place, and round the weights into `narrow`; scalars: those of SCALARS."""
    check_formats(grad, narrow)
    if not all(x is None or x.is_contiguous() for x in (weight, *moments, grad, narrow, scalars)):
        raise ValueError("a flat shard must be contiguous")
    if weight.numel():
        state, numbers = (weight, *moments), (rule.beta1, rule.beta2, rule.eps, rule.weight_decay)
        with on_device_of(weight):
            _update[flat_grid(weight.numel())](
                state, grad, narrow, scalars, numbers, weight.numel(), BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS
            )
