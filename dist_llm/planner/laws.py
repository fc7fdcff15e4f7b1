"""Scaling laws: the loss of N parameters trained on D tokens, and the best N and D of a budget of C = 6 N D FLOPs.

    parametric   L(N, D) = E + A / N^alpha + B / D^beta       N* = G (C / 6)^(beta / (alpha + beta))
                 G = (alpha A / (beta B))^(1 / (alpha + beta))          (Hoffmann et al. 2022, equations 2 and 4)
    power        N* = k C^a, D* = C / (6 N*)                            (their approaches 1 and 2)

Loss is in nats a token. Intervals hold 95 % of what the fit leaves open; another law may still lie outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

NORMAL_95 = 1.959964
"""Standard deviations on either side of the mean that hold 95 % of a normal distribution."""

PF_DAY = 1e15 * 86400
"""FLOPs of a day at one PFLOP/s."""

Interval = tuple[float, float]
Covariance = tuple[tuple[float, ...], ...]
"""Of (ln A, ln B, ln E, alpha, beta), 5 x 5."""
Logs = tuple[float, float, float, float, float]
"""(ln A, ln B, ln E, alpha, beta), in which fits are made."""


@dataclass(frozen=True)
class Optimum:
    """The best use of a training budget in FLOPs; loss and 95 % intervals are None where the law's source has none."""

    flops: float
    num_params: float
    tokens: float
    loss: float | None = None
    num_params_interval: Interval | None = None
    tokens_interval: Interval | None = None


class Law(Protocol):
    """What a planner asks of a scaling law; laws do not change."""

    def __hash__(self) -> int:
        """Return a number that is equal for equal laws."""

    @property
    def name(self) -> str:
        """Name by which a user chooses it."""

    @property
    def citation(self) -> str:
        """Where its constants come from."""

    @property
    def counts_embeddings(self) -> bool:
        """Whether its number of parameters includes the embeddings."""

    @property
    def fitted_flops(self) -> Interval | None:
        """Least and greatest training FLOPs of a run that it was fitted to."""

    def loss(self, num_params: float, tokens: float) -> float | None:
        """Return the loss in nats a token, None where the law says nothing of it."""

    def optimal(self, flops: float) -> Optimum:
        """Return the best parameters and tokens of a training budget in FLOPs."""


@dataclass(frozen=True)
class Constants:
    """The five constants of L(N, D), unrounded; loss in nats a token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, num_params: float, tokens: float) -> float:
        """Return L(N, D) in nats a token."""
        return float(self.E + self.A * num_params**-self.alpha + self.B * tokens**-self.beta)

    @property
    def exponent(self) -> float:
        """Exponent a of N* = G (C / 6)^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def log_ratio(self) -> float:
        """ln G, where G = (alpha A / (beta B))^(1 / (alpha + beta))."""
        return math.log(self.alpha * self.A / (self.beta * self.B)) / (self.alpha + self.beta)

    def best_params(self, flops: float) -> float:
        """Return N* = G (C / 6)^a."""
        return math.exp(self.log_ratio + self.exponent * math.log(flops / 6))

    def logs(self) -> Logs:
        """Return (ln A, ln B, ln E, alpha, beta), in which fits are made."""
        return math.log(self.A), math.log(self.B), math.log(self.E), self.alpha, self.beta

    @staticmethod
    def from_logs(logs: Logs) -> Constants:
        """Return the constants of (ln A, ln B, ln E, alpha, beta)."""
        a, b, e, alpha, beta = logs
        return Constants(math.exp(e), math.exp(a), math.exp(b), alpha, beta)


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, and how well it is known.

    Intervals come from `resamples`, constants of the same fit to resampled runs, or where there are none from the
    covariance of the constants' logarithms. scatter: standard deviation of ln L of a run about the law; widening: what
    intervals of losses are multiplied by, because the runs are few or those left out lay further off than expected.
    """

    name: str
    citation: str
    constants: Constants
    covariance: Covariance | None = None
    resamples: tuple[Constants, ...] = ()
    scatter: float = 0.0
    widening: float = 1.0
    fitted_flops: Interval | None = None
    counts_embeddings: bool = True

    def loss(self, num_params: float, tokens: float) -> float:
        """Return L(N, D) in nats a token."""
        return self.constants.loss(num_params, tokens)

    def loss_interval(self, num_params: float, tokens: float) -> Interval | None:
        """Return where a run's loss lies with 95 %; None where nothing is known of how well the law is."""
        if not self.resamples and self.covariance is None:
            return None
        loss = self.loss(num_params, tokens)
        if self.resamples:
            low, high = middle_95([found.loss(num_params, tokens) for found in self.resamples])
            below, above = max(0.0, math.log(loss / low)), max(0.0, math.log(high / loss))
        else:
            below = above = NORMAL_95 * self._log_loss_error(num_params, tokens)
        below, above = (self.widening * math.hypot(part, NORMAL_95 * self.scatter) for part in (below, above))
        return loss * math.exp(-below), loss * math.exp(above)

    def optimal(self, flops: float) -> Optimum:
        """Return the N and D = C / (6 N) of least loss."""
        num_params = self.constants.best_params(flops)
        tokens = flops / (6 * num_params)
        loss = self.loss(num_params, tokens)
        if self.resamples:
            low, high = middle_95([found.best_params(flops) for found in self.resamples])
            low, high = min(low, num_params), max(high, num_params)
        elif self.covariance is not None:
            widest = math.exp(NORMAL_95 * self._log_params_error(self.covariance, flops))
            low, high = num_params / widest, num_params * widest
        else:
            return Optimum(flops, num_params, tokens, loss)
        return Optimum(flops, num_params, tokens, loss, (low, high), (flops / (6 * high), flops / (6 * low)))

    def tokens_for(self, num_params: float, loss: float) -> float:
        """Return the tokens on which N parameters reach a loss; infinite where they never do."""
        found = self.constants
        left = loss - found.E - found.A * num_params**-found.alpha
        return (found.B / left) ** (1 / found.beta) if left > 0 else math.inf

    def budget_for(self, num_params: float) -> float:
        """Return the FLOPs for which N parameters are the best."""
        return 6 * math.exp((math.log(num_params) - self.constants.log_ratio) / self.constants.exponent)

    def _log_loss_error(self, num_params: float, tokens: float) -> float:
        """Return the standard error of ln L that the covariance of the constants makes."""
        assert self.covariance is not None
        found, loss = self.constants, self.loss(num_params, tokens)
        of_params = found.A * num_params**-found.alpha / loss
        of_tokens = found.B * tokens**-found.beta / loss
        logs = (math.log(num_params), math.log(tokens))
        slope = (of_params, of_tokens, found.E / loss, -of_params * logs[0], -of_tokens * logs[1])
        return math.sqrt(max(0.0, quadratic_form(slope, self.covariance)))

    def _log_params_error(self, covariance: Covariance, flops: float) -> float:
        """Return the standard error of ln N* that the covariance of the constants makes."""
        alpha, beta, log_budget = self.constants.alpha, self.constants.beta, math.log(flops / 6)
        total, log_ratio = alpha + beta, self.constants.log_ratio
        slope = (
            1 / total,
            -1 / total,
            0.0,
            (1 / alpha - log_ratio - beta / total * log_budget) / total,
            (-1 / beta - log_ratio + alpha / total * log_budget) / total,
        )
        return math.sqrt(max(0.0, quadratic_form(slope, covariance)))


@dataclass(frozen=True)
class PowerLaw:
    """N* = coefficient C^exponent, D* = C / (6 N*); it turns about the middle of the budgets that were fitted."""

    name: str
    citation: str
    coefficient: float
    exponent: float
    exponent_interval: Interval | None = None
    fitted_flops: Interval | None = None
    counts_embeddings: bool = True

    def loss(self, num_params: float, tokens: float) -> None:
        """Return None: the law says how a budget is best used, not how well."""

    def optimal(self, flops: float) -> Optimum:
        """Return the best N and D = C / (6 N)."""
        num_params = self.coefficient * flops**self.exponent
        tokens = flops / (6 * num_params)
        if self.exponent_interval is None or self.fitted_flops is None:
            return Optimum(flops, num_params, tokens)
        away = flops / math.sqrt(self.fitted_flops[0] * self.fitted_flops[1])
        turned = [num_params * away ** (end - self.exponent) for end in self.exponent_interval]
        low, high = min(*turned, num_params), max(*turned, num_params)
        around_tokens = (flops / (6 * high), flops / (6 * low))
        return Optimum(flops, num_params, tokens, None, (low, high), around_tokens)


@dataclass(frozen=True)
class KaplanLaw:
    """Kaplan et al. 2020: L(N, D) of two power laws and N* of the budget in PF-days; N counts no embeddings."""

    name: str
    citation: str
    params_scale: float
    params_exponent: float
    tokens_scale: float
    tokens_exponent: float
    params_of_pf_day: float
    budget_exponent: float
    fitted_flops: Interval | None = None
    counts_embeddings: bool = False

    def loss(self, num_params: float, tokens: float) -> float:
        """Return ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D in nats a token (their equation 1.5)."""
        of_params = (self.params_scale / num_params) ** (self.params_exponent / self.tokens_exponent)
        return float((of_params + self.tokens_scale / tokens) ** self.tokens_exponent)

    def optimal(self, flops: float) -> Optimum:
        """Return N* = N_e C^p with C in PF-days, and D = C / (6 N)."""
        num_params = self.params_of_pf_day * (flops / PF_DAY) ** self.budget_exponent
        tokens = flops / (6 * num_params)
        return Optimum(flops, num_params, tokens, self.loss(num_params, tokens))


def middle_95(values: list[float]) -> Interval:
    """Return percentiles 2.5 and 97.5."""
    ordered = sorted(values)
    return ordered[int(0.025 * len(ordered))], ordered[min(len(ordered) - 1, int(0.975 * len(ordered)))]


def quadratic_form(vector: tuple[float, ...], matrix: Covariance) -> float:
    """Return v' M v."""
    return sum(
        x * y * entry for x, row in zip(vector, matrix, strict=True) for y, entry in zip(vector, row, strict=True)
    )


def spread(optima: list[Optimum]) -> tuple[Interval, Interval]:
    """Return the least and greatest of parameters and of tokens over what several laws advise."""
    params, tokens = [found.num_params for found in optima], [found.tokens for found in optima]
    return (min(params), max(params)), (min(tokens), max(tokens))
