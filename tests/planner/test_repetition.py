"""Repeated data are worth less: Muennighoff et al. 2023."""

from __future__ import annotations

import math

import pytest

from dist_llm.planner.published_laws import parametric
from dist_llm.planner.repetition import (
    MUENNIGHOFF_DECAY,
    effective_params,
    effective_tokens,
    optimal_repeated,
    params_fed_by,
    repeated_loss,
)

LAW = parametric("muennighoff")


@pytest.mark.parametrize(
    ("num_params", "tokens", "loss"), [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)]
)
def test_check_values_of_the_authors(num_params: float, tokens: float, loss: float) -> None:
    """README of their repository `datablations`: 25e9 unique tokens."""
    assert repeated_loss(LAW, num_params, tokens, 25e9) == pytest.approx(loss, abs=1e-12)


def test_fresh_data_are_worth_themselves() -> None:
    assert effective_tokens(10e9, 25e9) == 10e9
    assert repeated_loss(LAW, 1e9, 10e9, 25e9) == pytest.approx(
        LAW.loss(effective_params(1e9, 10e9, LAW.constants), 10e9)
    )
    fed = params_fed_by(25e9, LAW.constants)
    assert effective_params(fed / 2, 25e9, LAW.constants) == fed / 2


def test_worth_has_a_ceiling() -> None:
    ceiling = 25e9 * (1 + MUENNIGHOFF_DECAY.repeated_tokens)
    assert effective_tokens(1e15, 25e9) == pytest.approx(ceiling)
    assert effective_tokens(100e9, 25e9) == pytest.approx(25e9 * (1 + 15.387756 * (1 - math.exp(-3 / 15.387756))))


def test_four_epochs_cost_little_and_forty_much() -> None:
    """Section 5 of the paper: up to 4 epochs repeated data are nearly as good as new, at 40 they are worth little."""
    for epochs, least, most in ((4, 0.9, 1.0), (40, 0.3, 0.45)):
        assert least < effective_tokens(epochs * 25e9, 25e9) / (epochs * 25e9) < most


@pytest.mark.parametrize("name", ["muennighoff", "besiroglu"])
def test_params_fed_are_those_of_the_budget_of_the_tokens(name: str) -> None:
    law = parametric(name)
    best = law.optimal(1e22)
    assert params_fed_by(best.tokens, law.constants) == pytest.approx(best.num_params)


@pytest.mark.parametrize("name", ["muennighoff", "besiroglu", "hoffmann-3"])
def test_optimum_beats_its_neighbours(name: str) -> None:
    law, flops, unique = parametric(name), 1e22, 25e9
    found = optimal_repeated(law, flops, unique)
    assert found.epochs == pytest.approx(found.tokens / unique)
    assert found.epochs > 1
    assert found.effective_tokens < found.tokens
    for factor in (0.7, 0.95, 1.05, 1.4):
        num_params = found.num_params * factor
        assert repeated_loss(law, num_params, flops / (6 * num_params), unique) > found.loss


def test_plenty_of_data_changes_nothing() -> None:
    law = parametric("besiroglu")
    found, best = optimal_repeated(law, 1e22, 1e13), law.optimal(1e22)
    assert (found.num_params, found.tokens, found.loss) == (best.num_params, best.tokens, best.loss)
    assert found.epochs == 1
