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

Interval = tuple[float, float]
Covariance = tuple[tuple[float, ...], ...]
"""Of (ln A, ln B, ln E, alpha, beta), 5 x 5."""


@dataclass(frozen=True)
class Optimum:
    """The best use of a training budget: parameters, tokens, their 95 % intervals, and loss where the law has one."""

    num_params: float
    tokens: float
    loss: float | None
    num_params_interval: Interval
    tokens_interval: Interval


class Law(Protocol):
    """What a planner asks of a scaling law."""

    @property
    def name(self) -> str:
        """Name by which a user chooses it."""

    @property
    def citation(self) -> str:
        """Where its constants come from."""

    @property
    def counts_embeddings(self) -> bool:
        """Whether its number of parameters includes the embeddings."""

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
        return self.E + self.A * num_params**-self.alpha + self.B * tokens**-self.beta

    @property
    def exponent(self) -> float:
        """Exponent a of N* = G (C / 6)^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def log_ratio(self) -> float:
        """ln G, where G = (alpha A / (beta B))^(1 / (alpha + beta))."""
        return math.log(self.alpha * self.A / (self.beta * self.B)) / (self.alpha + self.beta)

    def logs(self) -> tuple[float, float, float, float, float]:
        """Return (ln A, ln B, ln E, alpha, beta), in which fits are made."""
        return math.log(self.A), math.log(self.B), math.log(self.E), self.alpha, self.beta

    @staticmethod
    def from_logs(logs: tuple[float, float, float, float, float]) -> Constants:
        """Return the constants of (ln A, ln B, ln E, alpha, beta)."""
        a, b, e, alpha, beta = logs
        return Constants(math.exp(e), math.exp(a), math.exp(b), alpha, beta)


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta; covariance: of the constants' logarithms, None where none is known."""

    name: str
    citation: str
    constants: Constants
    covariance: Covariance | None = None
    counts_embeddings: bool = True

    def loss(self, num_params: float, tokens: float) -> float:
        """Return L(N, D) in nats a token."""
        return self.constants.loss(num_params, tokens)

    def optimal(self, flops: float) -> Optimum:
        """Return the N and D = C / (6 N) of least loss, intervals by the delta method."""
        found = self.constants
        log_params = found.log_ratio + found.exponent * math.log(flops / 6)
        num_params, tokens = math.exp(log_params), flops / 6 * math.exp(-log_params)
        widest = math.exp(NORMAL_95 * self._log_params_error(flops))
        return Optimum(
            num_params,
            tokens,
            self.loss(num_params, tokens),
            (num_params / widest, num_params * widest),
            (tokens / widest, tokens * widest),
        )

    def tokens_for(self, num_params: float, loss: float) -> float:
        """Return the tokens on which N parameters reach a loss; infinite where they never do."""
        found = self.constants
        left = loss - found.E - found.A * num_params**-found.alpha
        return (found.B / left) ** (1 / found.beta) if left > 0 else math.inf

    def budget_for(self, num_params: float) -> float:
        """Return the FLOPs for which N parameters are the best."""
        return 6 * math.exp((math.log(num_params) - self.constants.log_ratio) / self.constants.exponent)

    def _log_params_error(self, flops: float) -> float:
        """Return the standard error of ln N* from the covariance of the constants."""
        if self.covariance is None:
            return 0.0
        alpha, beta, log_budget = self.constants.alpha, self.constants.beta, math.log(flops / 6)
        total, log_ratio = alpha + beta, self.constants.log_ratio
        slope = (
            1 / total,
            -1 / total,
            0.0,
            (1 / alpha - log_ratio - beta / total * log_budget) / total,
            (-1 / beta - log_ratio + alpha / total * log_budget) / total,
        )
        return math.sqrt(max(0.0, quadratic_form(slope, self.covariance)))


@dataclass(frozen=True)
class PowerLaw:
    """N* = coefficient C^exponent, D* = C / (6 N*); it turns about `pivot_flops`, the middle of what was fitted."""

    name: str
    citation: str
    coefficient: float
    exponent: float
    exponent_interval: Interval
    pivot_flops: float
    counts_embeddings: bool = True

    def loss(self, num_params: float, tokens: float) -> None:
        """Return None: the law says how a budget is best used, not how well."""

    def optimal(self, flops: float) -> Optimum:
        """Return the best N and D = C / (6 N)."""
        num_params = self.coefficient * flops**self.exponent
        turned = [num_params * (flops / self.pivot_flops) ** (end - self.exponent) for end in self.exponent_interval]
        low, high = min(*turned, num_params), max(*turned, num_params)
        tokens = flops / (6 * num_params)
        return Optimum(num_params, tokens, None, (low, high), (flops / (6 * high), flops / (6 * low)))


def quadratic_form(vector: tuple[float, ...], matrix: Covariance) -> float:
    """Return v' M v."""
    return sum(x * y * entry for x, row in zip(vector, matrix, strict=True) for y, entry in zip(vector, row, strict=True))


def spread(optima: list[Optimum]) -> tuple[Interval, Interval]:
    """Return the least and greatest of parameters and of tokens over what several laws advise."""
    params, tokens = [found.num_params for found in optima], [found.tokens for found in optima]
    return (min(params), max(params)), (min(tokens), max(tokens))
