"""The dynamic loss scale of fp16: halved by an overflow, doubled after a window of good steps, still otherwise."""

from __future__ import annotations

import pytest

from dist_llm.config.training import PrecisionConfig
from dist_llm.engine.loss_scale import LossScale


def test_it_halves_at_once_and_doubles_after_the_window() -> None:
    scale = LossScale.build(PrecisionConfig(name="fp16", initial_loss_scale=16.0, loss_scale_window=3))
    seen = []
    for finite in (True, True, False, True, True, True, True):
        scale.update(finite, dynamic=True)
        seen.append(scale.value)
    assert seen == [16.0, 16.0, 8.0, 8.0, 8.0, 16.0, 16.0]
    assert scale.good_steps == 1


def test_it_does_not_fall_below_one() -> None:
    scale = LossScale(1.5, 10)
    for _ in range(3):
        scale.update(finite=False, dynamic=True)
    assert scale.value == 1.0


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_other_formats_have_none(name: str) -> None:
    scale = LossScale.build(PrecisionConfig.model_validate({"name": name}))
    scale.update(finite=False, dynamic=False)
    assert scale.value == 1.0
