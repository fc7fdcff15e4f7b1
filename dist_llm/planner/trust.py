"""A law fitted to one's own runs, and how far it may be trusted.

Constants vary over resamples of the runs (bootstrap, Efron 1979); each run is predicted from all others; and the runs
of most compute are predicted from the rest. Where those lie further off than resamples and scatter say, intervals of
predictions are widened by as much. Resamples are drawn from a seed: the same runs give the same law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dist_llm.planner.fitting import (
    DELTA,
    PUBLISHED_PRIOR,
    Prior,
    Problem,
    Run,
    Variants,
    solve,
    solve_variants,
)
from dist_llm.planner.laws import NORMAL_95, Interval, ParametricLaw, middle_95

if TYPE_CHECKING:
    from dist_llm.planner.fitting import Array

FEWEST_RUNS = 6
"""One more than there are constants."""
MANY_RUNS = 100
"""With fewer a fit leans on the published exponents unless told otherwise, and residuals are resampled, not runs."""
RESAMPLES = 200
LEAST_SCATTER = 1e-3
"""Runs that differ in their seed alone differ by more in ln L, however well a law goes through a few of them."""
LARGEST_SHARE = 0.25
"""Share of the runs, those of most compute, that are predicted from the rest."""


@dataclass(frozen=True)
class Prediction:
    """A run's loss as a fit that did not see it says, in nats a token, and as it was."""

    run: Run
    loss: float
    interval: Interval

    @property
    def error(self) -> float:
        """Predicted over measured loss, less one."""
        return self.loss / self.run.loss - 1

    @property
    def contained(self) -> bool:
        """Whether the measured loss lies in the interval."""
        return self.interval[0] <= self.run.loss <= self.interval[1]


@dataclass(frozen=True)
class Trust:
    """Where the runs lie, and how well runs that a fit did not see were predicted."""

    num_params: Interval
    tokens: Interval
    flops: Interval
    left_out_error: float
    largest_runs: tuple[Prediction, ...]
    largest_runs_reach: float
    """Greatest compute among the largest runs over the greatest among the rest."""

    @property
    def largest_runs_error(self) -> float:
        """Mean absolute relative error of the largest runs predicted from the rest."""
        errors = [abs(prediction.error) for prediction in self.largest_runs]
        return sum(errors) / len(errors) if errors else math.nan


@dataclass(frozen=True)
class Fit:
    """A fitted law, the runs, and what is known of its worth."""

    law: ParametricLaw
    runs: tuple[Run, ...]
    huber_sum: float
    prior: Prior | None
    trust: Trust

    def predict(self, run: Run) -> Prediction:
        """Return what the law says of a run that it was not fitted to."""
        interval = self.law.loss_interval(run.num_params, run.tokens)
        assert interval is not None
        return Prediction(run, self.law.loss(run.num_params, run.tokens), interval)

    def constant_interval(self, name: str) -> Interval:
        """Return percentiles 2.5 and 97.5 of a constant over the resamples, widened where it lies outside itself."""
        low, high = middle_95([getattr(constants, name) for constants in self.law.resamples])
        value = getattr(self.law.constants, name)
        return min(low, value), max(high, value)


def usual_prior(num_runs: int) -> Prior | None:
    """Return the prior on exponents that a fit to so many runs takes unless told otherwise."""
    return PUBLISHED_PRIOR if num_runs < MANY_RUNS else None


def fit_law(
    runs: Sequence[Run],
    name: str = "own",
    delta: float = DELTA,
    prior: Prior | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Fit:
    """Return the law of at least FEWEST_RUNS runs with its intervals and trust; the same for the same seed."""
    runs = tuple(runs)
    problem = Problem(runs, delta, prior)
    best, solution = solve(problem)
    law = _law_of(problem, best, runs, name, _Resampling(resamples, seed))
    largest, reach = _predict_largest(runs, delta, prior, _Resampling(resamples, seed))
    off = [prediction_error(prediction) for prediction in largest]
    if off:
        law = replace(law, widening=max(law.widening, math.sqrt(sum(z * z for z in off) / len(off))))
    trust = Trust(
        _range(runs, "num_params"),
        _range(runs, "tokens"),
        _range(runs, "flops"),
        _left_out_error(problem, best, runs),
        tuple(largest),
        reach,
    )
    return Fit(law, runs, solution.huber_sum, prior, trust)


def prediction_error(prediction: Prediction) -> float:
    """Return how many standard errors of the prediction the measured loss lies off."""
    low, high = prediction.interval
    return abs(math.log(prediction.loss / prediction.run.loss)) / (math.log(high / low) / (2 * NORMAL_95))


@dataclass(frozen=True)
class _Resampling:
    count: int
    seed: int


def _law_of(problem: Problem, best: Array, runs: tuple[Run, ...], name: str, resampling: _Resampling) -> ParametricLaw:
    """Return the law that `best` is, with constants of resampled runs."""
    from scipy.special import stdtrit

    residuals, _ = problem.residuals(best)
    variants = solve_variants(problem, best, _resample(residuals, resampling, problem.prior))
    freedom = max(1, len(runs) - 5)
    return ParametricLaw(
        name,
        f"fitted to {len(runs)} runs",
        problem.constants(best),
        resamples=tuple(problem.constants(q) for q in variants),
        scatter=max(LEAST_SCATTER, math.sqrt(float(residuals @ residuals) / freedom)),
        widening=float(stdtrit(freedom, 0.975)) / NORMAL_95,
        fitted_flops=_range(runs, "flops"),
    )


def _resample(residuals: Array, resampling: _Resampling, prior: Prior | None) -> Variants:
    """Return resamples of the runs.

    Many runs are drawn with replacement. Of few that could leave a size or a length out altogether: all stay, and each
    gets the residual of a run drawn in its place, enlarged for the five constants that were fitted to them. A prior is
    drawn as well, from itself: what runs do not show stays as uncertain as it was.
    """
    import numpy as np

    generator, num_runs, resamples = np.random.default_rng(resampling.seed), residuals.size, resampling.count
    drawn = generator.integers(0, num_runs, (resamples, num_runs))
    beliefs = None if prior is None else generator.normal(prior.exponent, prior.deviation, (resamples, 2))
    if num_runs >= MANY_RUNS:
        weights = np.stack([np.bincount(row, minlength=num_runs) for row in drawn]).astype(float)
        return Variants(weights, np.zeros_like(weights), beliefs)
    enlarged = residuals * math.sqrt(num_runs / max(1, num_runs - 5))
    signs = generator.choice([-1.0, 1.0], (resamples, num_runs))
    return Variants(np.ones((resamples, num_runs)), residuals - signs * enlarged[drawn], beliefs)


def _predict_largest(
    runs: tuple[Run, ...], delta: float, prior: Prior | None, resampling: _Resampling
) -> tuple[list[Prediction], float]:
    """Predict the runs of most compute from the rest; nothing where the rest would be too few."""
    ordered = sorted(runs, key=lambda run: run.flops)
    count = max(1, round(LARGEST_SHARE * len(runs)))
    rest, largest = tuple(ordered[:-count]), ordered[-count:]
    if len(rest) < FEWEST_RUNS:
        return [], math.nan
    problem = Problem(rest, delta, prior)
    law = _law_of(problem, solve(problem)[0], rest, "rest", resampling)
    found = []
    for run in largest:
        interval = law.loss_interval(run.num_params, run.tokens)
        assert interval is not None
        found.append(Prediction(run, law.loss(run.num_params, run.tokens), interval))
    return found, largest[-1].flops / rest[-1].flops


def _left_out_error(problem: Problem, best: Array, runs: tuple[Run, ...]) -> float:
    """Return the mean absolute relative error of each run predicted from all others."""
    import numpy as np

    weights = 1 - np.eye(len(runs))
    found = solve_variants(problem, best, Variants(weights, np.zeros_like(weights)))
    laws = [problem.constants(q) for q in found]
    errors = [abs(law.loss(run.num_params, run.tokens) / run.loss - 1) for law, run in zip(laws, runs, strict=True)]
    return sum(errors) / len(errors)


def _range(runs: tuple[Run, ...], attribute: str) -> Interval:
    values = [float(getattr(run, attribute)) for run in runs]
    return min(values), max(values)
