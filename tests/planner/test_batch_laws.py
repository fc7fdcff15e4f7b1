"""Learning rate and batch size from published power laws."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.foresight_laws import _batch
from dist_llm.planner.batch_laws import BATCH_LAWS, advise, nearest_setting, recommend


def test_laws_by_hand() -> None:
    """At N = 1e9 and D = 1e11 (C = 6e20), worked out from the papers' formulas."""
    by_hand = {
        "deepseek": (0.3118 * 6e20**-0.125, 0.2920 * 6e20**0.3271),
        "step-law": (1.782 * 1e9**-0.7122 * 1e11**0.3070, 0.5733 * 1e11**0.5713),
        "olmo-ladder": (0.0047 * (1e9 / 108e6) ** (-1 / 3), 160 * 2048 * (1e9 / 108e6) ** (2 / 3)),
    }
    assert BATCH_LAWS.keys() == by_hand.keys()
    for name, (rate, batch) in by_hand.items():
        advice = advise(BATCH_LAWS[name], 1e9, 1e11, 2048)
        assert advice.learning_rate == pytest.approx(rate)
        assert advice.batch_tokens == pytest.approx(batch)
        assert advice.batch_sequences == round(batch / 2048)


def test_deepseek_67b_as_trained() -> None:
    """DeepSeek LLM, Table 2: the 67B model, 2T tokens, was trained with 3.2e-4 and 4608 sequences of 4096 tokens."""
    advice = advise(BATCH_LAWS["deepseek"], 67e9, 2e12, 4096)
    assert advice.learning_rate == pytest.approx(3.2e-4, rel=0.15)
    assert advice.batch_sequences == pytest.approx(4608, rel=0.3)


def test_recommendation_lies_in_its_spread() -> None:
    found = recommend(7e9, 2e12, 4096)
    assert found.learning_rate_spread[0] <= found.learning_rate <= found.learning_rate_spread[1]
    assert found.batch_tokens_spread[0] <= found.batch_tokens <= found.batch_tokens_spread[1]
    assert {advice.law for advice in found.each} == set(BATCH_LAWS)
    assert recommend(7e9, 2e12, 4096, "deepseek").learning_rate == BATCH_LAWS["deepseek"].learning_rate(7e9, 2e12)
    assert recommend(1e3, 1e3, 4096).batch_sequences == 1


def test_nearest_setting_is_in_logarithms() -> None:
    advice = advise(BATCH_LAWS["deepseek"], 1e9, 1e11, 2048)
    rate, batch = advice.learning_rate, advice.batch_tokens
    assert nearest_setting(advice, [(rate * 3, batch), (rate / 2, batch), (rate, batch * 2.5)]) == 1


def test_gaps_to_the_best_of_published_sweeps(anchors: Path) -> None:
    rows = list(_batch(anchors))
    assert len(rows) == 3
    assert all(holds for *_, holds in rows), rows
