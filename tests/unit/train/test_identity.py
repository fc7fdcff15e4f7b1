"""What counts as the same layout when a run goes on: what orders additions, however the config spells it."""

from __future__ import annotations

import pytest

from dist_llm.train.identity import layout_of
from tests.parallel.tiny import tiny_config

SAME: list[tuple[dict[str, object], dict[str, object]]] = [
    ({}, {"data": 8}),
    ({}, {"schedule": "gpipe"}),
    ({}, {"context_method": "ulysses"}),
    ({}, {"prefetch": 3}),
    ({}, {"compile_backend": "aot_eager"}),
    ({}, {"recompute_operators": ["norm"], "recompute_layers": 1}),
    ({"pipeline": 2, "schedule": "zbv"}, {"pipeline": 2, "schedule": "zbv", "virtual_pipeline": 2}),
    ({"recompute": "full"}, {"recompute": "full", "recompute_operators": ["norm"]}),
]
OTHERS: list[dict[str, object]] = [
    {"tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "schedule": "gpipe"},
    {"pipeline": 2, "schedule": "zbv"},
    {"context": 2},
    {"context": 2, "context_method": "ulysses"},
    {"recompute": "full"},
    {"recompute": "full", "recompute_layers": 1},
    {"recompute": "selective"},
    {"recompute": "selective", "recompute_operators": ["norm"]},
    {"compile": True},
    {"compile": True, "compile_backend": "aot_eager"},
    {"zero": 3},
    {"unit_blocks": 2},
]


def _layout(parallel: dict[str, object]) -> dict[str, object]:
    return layout_of(tiny_config(parallel), 8, "cpu")


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_two_spellings_are_one_layout(one: dict[str, object], other: dict[str, object]) -> None:
    assert _layout(one) == _layout(other)


def test_all_that_is_used_makes_another_layout() -> None:
    layouts = [_layout(parallel) for parallel in ({}, *OTHERS)]
    assert all(one != other for at, one in enumerate(layouts) for other in layouts[:at])
