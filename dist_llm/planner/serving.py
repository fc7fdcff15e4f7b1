"""A model that will be served is best trained smaller and longer (Sardana et al. 2024, arXiv 2401.00448).

    minimise  6 N D + 2 N D_served   subject to   L(N, D) = the loss wanted

A training token costs 6 N FLOPs, a served one 2 N. On the curve of equal loss D is a function of N, so that N alone is
sought, from the smallest that can reach the loss up to the compute-optimal one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_llm.planner.laws import ParametricLaw
from dist_llm.planner.line_search import lowest


@dataclass(frozen=True)
class ServedOptimum:
    """The cheapest model of a loss over training and serving, and what it saves against the compute-optimal one."""

    num_params: float
    tokens: float
    loss: float
    training_flops: float
    serving_flops: float
    saved_flops: float
    saved_share: float


def cheapest_served(law: ParametricLaw, training_flops: float, serving_tokens: float) -> ServedOptimum:
    """Return the model as good as the compute-optimal one of `training_flops` that is cheapest to train and serve."""
    usual = law.optimal(training_flops)
    assert usual.loss is not None
    loss, found = usual.loss, law.constants

    def total_flops(log_params: float) -> float:
        num_params = math.exp(log_params)
        return num_params * (6 * law.tokens_for(num_params, loss) + 2 * serving_tokens)

    smallest = math.log(found.A / (loss - found.E)) / found.alpha
    log_params = lowest(total_flops, smallest, math.log(usual.num_params))
    num_params = math.exp(log_params)
    tokens = law.tokens_for(num_params, loss)
    before = training_flops + 2 * usual.num_params * serving_tokens
    saved = before - total_flops(log_params)
    served = 2 * num_params * serving_tokens
    return ServedOptimum(num_params, tokens, loss, 6 * num_params * tokens, served, saved, saved / before)


def cheapest_as_good_as(law: ParametricLaw, num_params: float, serving_tokens: float) -> ServedOptimum:
    """Return the model as good as the compute-optimal one of `num_params` that is cheapest to train and serve."""
    return cheapest_served(law, law.budget_for(num_params), serving_tokens)


def best_within(law: ParametricLaw, total_flops: float, serving_tokens: float) -> ServedOptimum:
    """Return the best model whose training and serving together cost `total_flops`."""
    bound = math.log(total_flops / (2 * serving_tokens)) if serving_tokens else math.inf
    usual = math.log(law.optimal(total_flops).num_params)

    def loss_at(log_params: float) -> float:
        num_params = math.exp(log_params)
        tokens = (total_flops / num_params - 2 * serving_tokens) / 6
        return law.loss(num_params, tokens) if tokens > 0 else math.inf

    num_params = math.exp(lowest(loss_at, min(usual, bound) - math.log(1e6), min(usual, bound)))
    training = total_flops - 2 * num_params * serving_tokens
    return cheapest_served(law, _budget_as_good(law, loss_at(math.log(num_params)), training), serving_tokens)


def _budget_as_good(law: ParametricLaw, loss: float, most_flops: float) -> float:
    """Return the training budget whose compute-optimal loss is `loss`, at most `most_flops`."""
    low, high = math.log(most_flops) - math.log(1e12), math.log(most_flops)
    for _ in range(200):
        middle = (low + high) / 2
        found = law.optimal(math.exp(middle)).loss
        assert found is not None
        low, high = (middle, high) if found > loss else (low, middle)
    return math.exp(high)
