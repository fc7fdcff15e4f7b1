"""Fit L(N, D) = E + A / N^alpha + B / D^beta to runs (Hoffmann et al. 2022, appendix D.2).

    minimise  sum_i w_i Huber_d(LSE(a - alpha ln N_i, b - beta ln D_i, e) - ln L_i)      A = e^a, B = e^b, E = e^e

d = 1e-3, by L-BFGS from a grid of starts. Here ln N and ln D are measured from their means: the terms are then of the
loss's own size, constants hardly pull on exponents, and every start ends in the same place. Many variants of the same
runs (resamples, runs left out) are solved side by side by damped Newton steps on reweighted squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_llm.planner.laws import Constants

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

DELTA = 1e-3
"""Residual of ln L at which Huber's loss turns from square to straight."""
EXPONENTS = (0.2, 0.5)
FLOORS = (0.4, 0.8)
"""Starts of alpha and beta, and of E as a share of the least loss."""
LEAST_EXPONENT, LARGEST_EXPONENT = 0.02, 3.0
LEAST_SHARE = 1e-6
"""A term is at least this share of the least loss: its logarithm has no bottom where runs show nothing of it."""
_COARSE, _FINE = 1e-4, 1e-15
"""Relative decrease at which L-BFGS stops: from each start of the grid, and from the best end of those."""
_STEPS, _ENOUGH = 200, 1e-6
"""Damped Newton steps at most, and the relative decrease at which a variant is left alone."""


@dataclass(frozen=True)
class Run:
    """One trained model: parameters, tokens it was trained on, and its loss in nats a token."""

    name: str
    num_params: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        """Training FLOPs, 6 N D."""
        return 6 * self.num_params * self.tokens


@dataclass(frozen=True)
class Prior:
    """What is believed of both exponents before any run is seen: a normal distribution."""

    exponent: float
    deviation: float


PUBLISHED_PRIOR = Prior(exponent=0.35, deviation=0.1)
"""About where published exponents of N and D lie: 0.28 to 0.45 over this module's laws and their refits."""


@dataclass(frozen=True)
class Solution:
    """Constants of a fit, and the sum of Huber losses of the residuals of ln L (the prior's share not counted)."""

    constants: Constants
    huber_sum: float


class Problem:
    """The objective over q = (a', b', e, alpha, beta), where a' and b' are the logs of both terms at the middle run."""

    def __init__(self, runs: Sequence[Run], delta: float = DELTA, prior: Prior | None = None) -> None:
        """delta: see DELTA; prior None: the runs alone decide."""
        import numpy as np

        log_params, log_tokens = (np.log([getattr(run, name) for run in runs]) for name in ("num_params", "tokens"))
        self.middle = (float(log_params.mean()), float(log_tokens.mean()))
        self.log_params, self.log_tokens = log_params - self.middle[0], log_tokens - self.middle[1]
        self.log_losses: Array = np.log([run.loss for run in runs])
        self.delta, self.prior = delta, prior
        self.pull = 0.0
        """Curvature of the prior in units of the objective; set by `solve`, for it depends on the runs' noise."""

    def residuals(self, q: Array) -> tuple[Array, Array]:
        """Return residuals of ln L [..., runs] and their gradient by q [..., runs, 5], for q [..., 5]."""
        import numpy as np

        a, b, e, alpha, beta = np.moveaxis(q, -1, 0)[..., None]
        terms = np.stack([a - alpha * self.log_params, b - beta * self.log_tokens, e + 0 * self.log_params])
        top = terms.max(0)
        shares = np.exp(terms - top)
        total = shares.sum(0)
        shares /= total
        slopes = [shares[0], shares[1], shares[2], -shares[0] * self.log_params, -shares[1] * self.log_tokens]
        return top + np.log(total) - self.log_losses, np.stack(slopes, axis=-1)

    def value(self, q: Array) -> tuple[float, Array]:
        """Return the objective over delta and its gradient."""
        residuals, slopes = self.residuals(q)
        penalty, gradient = self.penalty(q, None)
        value = float(huber(residuals, self.delta).sum() + penalty)
        return value / self.delta, (residuals.clip(-self.delta, self.delta) @ slopes + gradient) / self.delta

    def penalty(self, q: Array, beliefs: Array | None) -> tuple[Any, Array]:
        """Return the prior's share of the objective [...] and its gradient [..., 5]; beliefs: its middle [..., 2]."""
        import numpy as np

        away = np.zeros_like(q)
        if self.prior is not None:
            away[..., 3:] = q[..., 3:] - (self.prior.exponent if beliefs is None else beliefs)
        return self.pull / 2 * (away**2).sum(-1), self.pull * away

    def bounds(self) -> list[tuple[float | None, float | None]]:
        """Return the least and greatest of each of q."""
        least = float(self.log_losses.min())
        lowest = least + math.log(LEAST_SHARE)
        exponents = (LEAST_EXPONENT, LARGEST_EXPONENT)
        return [(lowest, None), (lowest, None), (lowest, least), exponents, exponents]

    def starts(self) -> list[Array]:
        """Return the grid: the excess over E shared equally by both terms at the middle run."""
        import numpy as np

        least = float(self.log_losses.min())
        return [
            np.array([least + np.log((1 - floor) / 2)] * 2 + [least + np.log(floor), alpha, beta])
            for floor in FLOORS
            for alpha in EXPONENTS
            for beta in EXPONENTS
        ]

    def constants(self, q: Array) -> Constants:
        """Return the constants that q stands for."""
        a, b, e, alpha, beta = (float(part) for part in q)
        return Constants.from_logs((a + alpha * self.middle[0], b + beta * self.middle[1], e, alpha, beta))


def huber(residuals: Array, delta: float) -> Array:
    """Return Huber's loss of each residual: half its square up to delta, straight beyond."""
    import numpy as np

    size = np.abs(residuals)
    loss: Array = np.where(size <= delta, residuals**2 / 2, delta * (size - delta / 2))
    return loss


def solve(problem: Problem) -> tuple[Array, Solution]:
    """Return q and the fit of least objective over all starts; a prior is then weighed by the noise that was found."""
    ends = [_minimise(problem, start, _COARSE) for start in problem.starts()]
    best = _minimise(problem, min(ends, key=lambda end: problem.value(end)[0]), _FINE)
    if problem.prior is not None:
        for _ in range(2):
            problem.pull = problem.delta * noise(problem, best) / problem.prior.deviation**2
            best = _minimise(problem, best, _FINE)
    residuals, _ = problem.residuals(best)
    return best, Solution(problem.constants(best), float(huber(residuals, problem.delta).sum()))


def noise(problem: Problem, q: Array) -> float:
    """Return the mean absolute residual of ln L, five degrees of freedom taken off."""
    import numpy as np

    residuals, _ = problem.residuals(q)
    return float(np.abs(residuals).sum() / max(1, residuals.size - 5))


def _minimise(problem: Problem, start: Array, precision: float) -> Array:
    """Return the end of L-BFGS from a start."""
    from scipy.optimize import minimize

    options = {"maxiter": 1000, "maxfun": 2000, "ftol": precision, "gtol": 1e-9, "maxcor": 30}
    found = minimize(problem.value, start, jac=True, method="L-BFGS-B", bounds=problem.bounds(), options=options)
    end: Array = found.x
    return end


@dataclass(frozen=True)
class Variants:
    """S variants of the same runs: how often each counts, and what is added to its ln L; both [S, runs].

    beliefs: exponents [S, 2] that the prior of each holds most likely; None: those of the prior.
    """

    weights: Array
    shifts: Array
    beliefs: Array | None = None

    def some(self, which: Any) -> Variants:
        """Return the variants that `which` picks."""
        return Variants(self.weights[which], self.shifts[which], None if self.beliefs is None else self.beliefs[which])


def solve_variants(problem: Problem, start: Array, variants: Variants) -> Array:
    """Return q [S, 5] of the fits to S variants of the runs, all descending from `start` side by side.

    Each step solves a damped Newton system in which Huber's loss is a square of weight min(1, delta / |residual|).
    """
    import numpy as np

    count = len(variants.weights)
    q, damping, going = np.tile(start, (count, 1)), np.full(count, 1e-3), np.arange(count)
    for _ in range(_STEPS):
        rest = variants.some(going)
        before = _values(problem, q[going], rest)
        tried = _newton_step(problem, q[going], rest, damping[going])
        gain = before - _values(problem, tried, rest)
        q[going] = np.where(gain[:, None] > 0, tried, q[going])
        damping[going] = np.clip(damping[going] * np.where(gain > 0, 0.25, 8.0), 1e-9, 1e9)
        settled = (abs(gain) < _ENOUGH * before) | (damping[going] >= 1e9)
        going = going[~settled]
        if not going.size:
            break
    return q


def _newton_step(problem: Problem, q: Array, variants: Variants, damping: Array) -> Array:
    """Return q after one damped step, kept within bounds."""
    import numpy as np

    gradient, curvature = _slopes(problem, q, variants)
    diagonal = np.einsum("sii->si", curvature) * damping[:, None] + 1e-15
    step = np.linalg.solve(curvature + diagonal[..., None] * np.eye(5), gradient[..., None])[..., 0]
    lower, upper = zip(*problem.bounds(), strict=True)
    least = [-np.inf if end is None else end for end in lower]
    most = [np.inf if end is None else end for end in upper]
    moved: Array = np.clip(q - step, least, most)
    return moved


def _values(problem: Problem, q: Array, variants: Variants) -> Array:
    residuals, _ = problem.residuals(q)
    losses = huber(residuals - variants.shifts, problem.delta)
    total: Array = (variants.weights * losses).sum(-1) + problem.penalty(q, variants.beliefs)[0]
    return total


def _slopes(problem: Problem, q: Array, variants: Variants) -> tuple[Array, Array]:
    """Return the gradient [S, 5] and the curvature [S, 5, 5] of the objective."""
    import numpy as np

    residuals, slopes = problem.residuals(q)
    residuals = residuals - variants.shifts
    firm = variants.weights * np.minimum(1.0, problem.delta / np.maximum(np.abs(residuals), 1e-300))
    gradient = np.einsum("sn,sni->si", firm * residuals, slopes) + problem.penalty(q, variants.beliefs)[1]
    curvature = np.einsum("sn,sni,snj->sij", firm, slopes, slopes)
    curvature[:, 3, 3] += problem.pull
    curvature[:, 4, 4] += problem.pull
    return gradient, curvature
