"""Stages hold all layers in order, and the dearest is as cheap as any cut makes it."""

from __future__ import annotations

import itertools

import pytest

from dist_llm.accounting.stages import plan_stages
from dist_llm.cli.compose import compose
from dist_llm.config.checks import decode_and_check
from dist_llm.config.model import ModelConfig
from tests.parallel.tiny import tiny_config


def _preset(name: str) -> ModelConfig:
    return decode_and_check(compose([f"model={name}"]), None).model


def _dearest(sizes: tuple[int, ...], layer: int, embedding: int, head: int) -> int:
    costs = [size * layer for size in sizes]
    costs[0] += embedding
    costs[-1] += head
    return max(costs)


@pytest.mark.parametrize("vocab_size", [50, 400, 4000])
def test_no_cut_has_a_cheaper_dearest_stage(vocab_size: int) -> None:
    for layers, count in ((4, 2), (7, 3), (9, 4), (10, 5), (6, 6), (5, 1)):
        model = tiny_config({}, {"num_layers": layers, "vocab_size": vocab_size}).model
        stages = plan_stages(model, count)
        assert [index for stage in stages for index in stage.layers] == list(range(layers))
        sizes = tuple(len(stage.layers) for stage in stages)
        assert min(sizes) >= 1
        width, heads = model.hidden_size, model.num_heads + model.kv_heads
        layer = 2 * width * model.head_width * heads + 3 * width * model.ffn_hidden_size
        ends = (width, width * vocab_size)
        cuts = itertools.product(range(1, layers + 1), repeat=count)
        best = min(_dearest(cut, layer, *ends) for cut in cuts if sum(cut) == layers)
        assert _dearest(sizes, layer, *ends) == best


def test_llama_3_405b_is_cut_as_published() -> None:
    assert [len(stage.layers) for stage in plan_stages(_preset("llama3.1-405b"), 16)] == [7, *[8] * 14, 7]
    assert [(stage.first, stage.last) for stage in plan_stages(_preset("llama3.1-405b"), 16)][::15] == [
        (True, False),
        (False, True),
    ]
