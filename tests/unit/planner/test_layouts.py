"""The solver lists just what the rules allow, and names what is wrong with the rest."""

from __future__ import annotations

import itertools

import pytest

from dist_llm.accounting.schedules import Pipe
from dist_llm.config.checks import check
from dist_llm.config.rules import divisors
from dist_llm.config.run import RunConfig
from dist_llm.planner.layouts import Choice, judge_layout, legal_layouts
from dist_llm.planner.schedule_picture import draw_schedule
from dist_llm.planner.schedule_trace import trace_schedule
from tests.parallel.tiny import MOE, tiny_config
from tests.work import counted


def with_layout(config: RunConfig, layout: Choice) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=layout)})


def every_layout(config: RunConfig, ranks: int) -> list[Choice]:
    """Return the legal ones of all combinations, each checked by itself."""
    found = []
    options = {
        "tensor": divisors(ranks),
        "context": divisors(ranks),
        "pipeline": divisors(ranks),
        "data": divisors(ranks),
        "schedule": ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"),
        "virtual_pipeline": range(1, config.model.num_layers + 1),
        "sequence": (False, True),
        "context_method": ("ring", "ulysses", "mixed"),
        "context_heads": divisors(ranks),
        "expert": divisors(max(1, config.model.moe.num_experts)),
        "zero": (0, 1, 2, 3),
        "replicate": divisors(ranks),
    }
    for values in itertools.product(*options.values()):
        layout: Choice = dict(zip(options, values, strict=True))
        if layout["pipeline"] == 1 and (layout["schedule"], layout["virtual_pipeline"]) != ("1f1b", 1):
            continue
        if layout["schedule"] in ("zbv", "dualpipev") and layout["virtual_pipeline"] != 2:
            continue
        if (layout["tensor"] == 1 and layout["sequence"]) or (
            layout["context"] == 1 and layout["context_method"] != "ring"
        ):
            continue
        if layout["context_method"] == "mixed" and layout["context_heads"] in (1, layout["context"]):
            continue
        sizes = [int(str(layout[name])) for name in ("tensor", "context", "pipeline", "data")]
        if sizes[0] * sizes[1] * sizes[2] * sizes[3] != ranks:
            continue
        if not check(with_layout(config, layout), ranks):
            found.append(layout)
    return found


MODELS: list[tuple[int, dict[str, object]]] = [
    (1, {}),
    (2, MOE),
    (2, {"num_layers": 7}),
    (4, {}),
    (4, {"num_kv_heads": None}),
]


@pytest.mark.parametrize(("ranks", "model"), MODELS)
def test_it_lists_what_the_rules_allow(ranks: int, model: dict[str, object]) -> None:
    config = tiny_config({}, model)
    ours = [tuple(sorted(layout.items())) for layout in legal_layouts(config, ranks)]
    theirs = [tuple(sorted(layout.items())) for layout in every_layout(config, ranks)]
    assert len(set(ours)) == len(ours) > 0
    assert set(ours) == set(theirs)


def test_what_is_wrong_is_named_with_legal_layouts_near_it() -> None:
    config = tiny_config({"tensor": 3, "pipeline": 2, "schedule": "zbv"})
    found = legal_layouts(config, 8)
    verdict = judge_layout(config, 8, found)
    assert not verdict.legal
    assert {violation.key for violation in verdict.violations} == {"parallel.tensor", "ranks"}
    assert len(verdict.nearest) == 3
    for layout in verdict.nearest:
        assert check(with_layout(config, layout), 8) == []
        assert layout["pipeline"] == 2
    assert [layout["schedule"] for layout in verdict.nearest[:2]] == ["zbv", "zbv"]
    fine = tiny_config({"tensor": 2})
    assert judge_layout(fine, 2, legal_layouts(fine, 2)).legal


BROKEN: list[dict[str, object]] = [
    {"recompute_layers": 1},
    {"recompute": "selective", "recompute_operators": ["mlp", "activation"]},
    {"offload": "parameters", "zero": 0},
    {"fused_accumulation": True, "zero": 3},
    {"async_tensor": True, "compile": True, "sequence": True, "tensor": 2},
    {"async_tensor": True, "recompute_layers": 2, "tensor": 3},
]


@pytest.mark.parametrize("parallel", BROKEN, ids=str)
def test_settings_beside_a_layout_are_mended_too(parallel: dict[str, object]) -> None:
    config = tiny_config(parallel)
    found = legal_layouts(config, 4)
    verdict = judge_layout(config, 4, found)
    assert not verdict.legal
    assert verdict.elsewhere == ()
    assert len(verdict.nearest) == 3
    assert all(check(with_layout(config, layout), 4) == [] for layout in found)
    near = with_layout(config, verdict.nearest[0]).parallel
    assert (near.zero, near.pipeline) == (config.parallel.zero, config.parallel.pipeline)


def test_what_is_near_keeps_the_schedule_that_was_asked_for() -> None:
    config = tiny_config({"pipeline": 2, "schedule": "interleaved"})
    nearest = judge_layout(config, 2, legal_layouts(config, 2)).nearest
    assert [(layout["schedule"], layout["virtual_pipeline"]) for layout in nearest[:1]] == [("interleaved", 2)]


def test_what_no_layout_mends_is_said() -> None:
    config = tiny_config({}, None, {"seq_len": 4096})
    found = legal_layouts(config, 2)
    verdict = judge_layout(config, 2, found)
    assert found == []
    assert verdict.nearest == ()
    assert [violation.key for violation in verdict.elsewhere] == ["data.seq_len"]


def test_many_ranks_cost_no_search_of_all_products() -> None:
    with counted() as work:
        found = legal_layouts(
            tiny_config({}, {"num_layers": 64, "num_heads": 64, "head_dim": 8}, {"global_batch": 64}), 64
        )
    assert len(found) > 100
    assert work.lines < 60_000_000


def test_the_picture_is_drawn() -> None:
    for pipe in (Pipe("zbv", 4, 2, 8), Pipe("1f1b", 2, 1, 200)):
        assert draw_schedule(trace_schedule(pipe)).startswith(b"\x89PNG")
