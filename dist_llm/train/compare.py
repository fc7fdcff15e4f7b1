"""How far the traces of a layout are from those of one process, and the bounds that they are held to.

Relative: fp32 losses, gradient norms and weights ||a-b|| / ||b|| 1e-5; fp64 all 1e-9, gradients of the first step too;
bf16 see BOUNDS. A key bias that is added alike at every position has no true gradient under softmax and Adam turns its
rounding into steps, so its gradient is held to a share of the norm instead; under rotary positions or QK-norm it has
one, and it is compared as any weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dist_llm.train.layouts import Case
from dist_llm.train.trace import Array, Rectangle, Trace, assemble


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences; infinite: not judged. key_bias_gradient: as a share of the global norm."""

    loss: float
    grad_norm: float
    weights: float
    gradients: float
    key_bias_gradient: float


BOUNDS = {
    "fp32": Bounds(1e-5, 1e-5, 1e-5, math.inf, 1e-6),
    "fp64": Bounds(1e-9, 1e-9, 1e-9, 1e-9, 1e-9),
    "bf16": Bounds(5e-3, 5e-2, math.inf, 0.2, 1e-3),
}
"""By precision. In bf16 each layer's output is rounded to 1 / 256, and Adam makes a whole step of the sign of a small
gradient, so weights say nothing; the gradients of the first step, tensor by tensor, do: a sum that was dropped or taken
twice moves one of them by half. Tiny models over 79 layouts and 3 steps: loss 3e-5, norm 8e-4, gradients 0.07 (experts,
whose router may choose otherwise; 0.02 without).
"""


@dataclass(frozen=True)
class Difference:
    """How far a case is from one process: largest relative differences, and the tensors that differ most."""

    layout: str
    loss: float
    grad_norm: float
    weights: float
    worst_weight: str
    gradients: float
    worst_gradient: str
    key_bias_gradient: float
    seconds: float
    ok: bool
    first_divergence: Mapping[str, object] | None = None


def finite(gap: float) -> float:
    """Return the gap, infinite where it is not a number: NaN compares as neither larger nor smaller."""
    return gap if math.isfinite(gap) else math.inf


def largest_gap(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    return max((finite(abs(x - y) / abs(y)) for x, y in zip(a, b, strict=True)), default=0.0)


def key_bias_share(traces: list[Trace]) -> float:
    """Return the largest share of a key bias, whole, in the gradient norm of any step."""
    worst = 0.0
    for shares in zip(*(trace.key_bias_shares for trace in traces), strict=True):
        for name in {name for share in shares for name in share}:
            worst = max(worst, finite(math.sqrt(sum(share.get(name, 0.0) ** 2 for share in shares))))
    return worst


def without_gradient(one: list[Trace]) -> set[str]:
    """Return the key biases whose true gradient is zero."""
    return {name for trace in one for shares in trace.key_bias_shares for name in shares}


def tensor_gaps(ours: list[Rectangle], theirs: list[Rectangle], left_out: set[str]) -> dict[str, float]:
    """Return ||a - b|| / ||b|| of every logical tensor of `theirs`; what is missing differs infinitely."""
    mine, reference = assemble(ours), assemble(theirs)
    return {
        name: _gap(mine.get(name, np.full_like(whole, np.nan)), whole)
        for name, whole in reference.items()
        if name not in left_out
    }


def _gap(ours: Array, theirs: Array) -> float:
    scale = float(np.linalg.norm(theirs.astype(np.float64)))
    gap = float(np.linalg.norm(ours.astype(np.float64) - theirs.astype(np.float64)))
    return finite(gap / scale if scale else gap)


def gradients_of(traces: list[Trace]) -> list[Rectangle]:
    """Return the rectangles of the gradients at the step that was looked at."""
    return [row for trace in traces if trace.look is not None for row in trace.look.gradients]


def weights_of(traces: list[Trace]) -> list[Rectangle]:
    """Return the rectangles of the weights after the last step."""
    return [row for trace in traces for row in trace.weights]


def compare(case: Case, traces: list[Trace], one: list[Trace], precision: str, seconds: float) -> Difference:
    """Return how far the ranks of a case are from one process; what is missing or not a number differs infinitely."""
    bounds, left_out = BOUNDS[precision], without_gradient(one)
    weight, worst = worst_gap(tensor_gaps(weights_of(traces), weights_of(one), left_out))
    gradient, worst_gradient = worst_gap(tensor_gaps(gradients_of(traces), gradients_of(one), left_out))
    loss = max(largest_gap(trace.losses, one[0].losses) for trace in traces)
    norm = max(largest_gap(trace.grad_norms, one[0].grad_norms) for trace in traces)
    share = key_bias_share(traces)
    ok = (
        loss <= bounds.loss
        and norm <= bounds.grad_norm
        and weight <= bounds.weights
        and gradient <= bounds.gradients
        and share <= bounds.key_bias_gradient
    )
    gaps = (loss, norm, weight, worst, gradient, worst_gradient, share)
    return Difference(case.name, *gaps, round(seconds, 2), ok)


def worst_gap(gaps: dict[str, float]) -> tuple[float, str]:
    """Return the largest gap and its tensor; no name where there is no gap."""
    return max(((gap, name) for name, gap in gaps.items() if gap > 0), default=(0.0, ""))
