"""Loss when data is seen more than once: repeated tokens, and parameters beyond what the data feed, count for less.

    D' = U + U R*_D (1 - exp(-R_D / R*_D)),  R_D = D / U - 1           (U unique tokens)
    N' = V + V R*_N (1 - exp(-R_N / R*_N)),  R_N = N / V - 1           (V: best parameters for U tokens seen once)
    L  = E + A / N'^alpha + B / D'^beta                                (Muennighoff et al. 2023, arXiv 2305.16264)

With D <= U nothing repeats and D' = D; with N <= V, N' = N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_llm.planner.laws import Constants, ParametricLaw
from dist_llm.planner.line_search import lowest

_WIDEST = math.log(1e4)
"""The best N with repetition is sought this far on either side of the best without."""


@dataclass(frozen=True)
class Decay:
    """How fast repetition loses its worth: repeats after which a token, a parameter, has given 1 - 1/e of its all."""

    repeated_tokens: float
    excess_params: float


MUENNIGHOFF_DECAY = Decay(repeated_tokens=15.387756, excess_params=5.309743)
"""R*_D and R*_N, unrounded as the authors' repository `datablations` gives them."""


@dataclass(frozen=True)
class RepeatedOptimum:
    """The best use of a budget when only so many tokens exist."""

    num_params: float
    tokens: float
    epochs: float
    loss: float
    effective_tokens: float
    effective_params: float


def effective_tokens(tokens: float, unique_tokens: float, decay: Decay = MUENNIGHOFF_DECAY) -> float:
    """Return D': how many fresh tokens `tokens` seen of `unique_tokens` are worth."""
    return _worth(tokens, min(unique_tokens, tokens), decay.repeated_tokens)


def effective_params(
    num_params: float, unique_tokens: float, constants: Constants, decay: Decay = MUENNIGHOFF_DECAY
) -> float:
    """Return N': how many parameters count of `num_params` when `unique_tokens` feed them."""
    return _worth(num_params, min(params_fed_by(unique_tokens, constants), num_params), decay.excess_params)


def params_fed_by(unique_tokens: float, constants: Constants) -> float:
    """Return the parameters for which `unique_tokens` tokens, seen once, are compute-optimal."""
    log_ratio = constants.log_ratio
    return math.exp(log_ratio + constants.beta / constants.alpha * (math.log(unique_tokens) + log_ratio))


def repeated_loss(
    law: ParametricLaw, num_params: float, tokens: float, unique_tokens: float, decay: Decay = MUENNIGHOFF_DECAY
) -> float:
    """Return the loss in nats a token of N parameters trained on `tokens`, of which `unique_tokens` differ."""
    unique = min(unique_tokens, tokens)
    fed = effective_params(num_params, unique, law.constants, decay)
    return law.loss(fed, effective_tokens(tokens, unique, decay))


def optimal_repeated(
    law: ParametricLaw, flops: float, unique_tokens: float, decay: Decay = MUENNIGHOFF_DECAY
) -> RepeatedOptimum:
    """Return the N and D = C / (6 N) of least loss when only `unique_tokens` tokens exist."""
    best = law.optimal(flops)
    if best.tokens <= unique_tokens:
        return _describe(law, best.num_params, best.tokens, unique_tokens, decay)

    def loss_at(log_params: float) -> float:
        num_params = math.exp(log_params)
        return repeated_loss(law, num_params, flops / (6 * num_params), unique_tokens, decay)

    middle = math.log(best.num_params)
    num_params = math.exp(lowest(loss_at, middle - _WIDEST, middle + _WIDEST))
    return _describe(law, num_params, flops / (6 * num_params), unique_tokens, decay)


def _describe(
    law: ParametricLaw, num_params: float, tokens: float, unique_tokens: float, decay: Decay
) -> RepeatedOptimum:
    unique = min(unique_tokens, tokens)
    return RepeatedOptimum(
        num_params,
        tokens,
        tokens / unique,
        repeated_loss(law, num_params, tokens, unique, decay),
        effective_tokens(tokens, unique, decay),
        effective_params(num_params, unique, law.constants, decay),
    )


def _worth(amount: float, fresh: float, scale: float) -> float:
    """Return what `amount` is worth when `fresh` of it is new and the rest decays with `scale`."""
    repeats = amount / fresh - 1
    return fresh + fresh * scale * (1 - math.exp(-repeats / scale))
