"""Which engines `verify engine` compares, in which layouts, and what it says of the others."""

from __future__ import annotations

from typing import Any

import pytest

from dist_llm.config.engine_rules import ENGINES
from dist_llm.config.operations import EngineConfig
from dist_llm.errors import ConfigError
from dist_llm.train.engine_cases import CASES, Plan, Shared, choose, plan_comparison
from dist_llm.train.engines import OWN_SETTINGS, on_engine, read_names, with_reference
from tests.parallel.tiny import GPT2, MOE, tiny_config

ONE, TWO, THREE = ENGINES


def _engines(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {shared.case.name.removeprefix("as-given "): shared.engines for shared in plan.shared}


def test_each_engine_takes_part_where_its_rules_allow() -> None:
    plan = plan_comparison(tiny_config())
    found = _engines(plan)
    assert plan.engines == ENGINES
    assert found["ranks=2 data=2 zero=1 accumulation=2"] == ENGINES
    assert found["ranks=2 data=2 zero=3 accumulation=2"] == ("native", "deepspeed")
    assert found["ranks=2 tensor=2 sequence=True accumulation=2"] == ENGINES
    assert found["ranks=8 tensor=2 sequence=True pipeline=2 data=2 zero=1 accumulation=4"] == ("native", "megatron")
    why = plan.not_shared["deepspeed: as-given ranks=2 pipeline=2 accumulation=4"]
    assert why.startswith("engine.name=deepspeed runs no pipeline")


@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "experts"])
def test_every_layout_is_legal_for_the_native_engine(model: dict[str, object]) -> None:
    assert not [key for key in plan_comparison(tiny_config({}, model)).not_shared if key.startswith("native")]


def test_every_axis_and_zero_stage_is_shared_and_experts_too_where_there_are_any() -> None:
    together = " ".join(_engines(plan_comparison(tiny_config())))
    assert all(axis in together for axis in ("data", "tensor", "sequence", "pipeline", "virtual_pipeline", "context"))
    assert all(f"zero={stage}" in together for stage in (1, 2, 3))
    assert any("expert=2" in case.name for case in choose(tiny_config({}, MOE), "all"))
    assert not any("expert=2" in case.name for case in choose(tiny_config(), "all"))


def test_an_engine_that_cannot_train_the_model_is_left_out_in_the_words_of_the_rule() -> None:
    plan = plan_comparison(tiny_config({}, GPT2))
    assert plan.engines == ("native", "deepspeed")
    assert "model.dropout=0.1 would have to be 0.0" in plan.left_out["megatron"]


def test_one_engine_alone_is_refused_with_the_reasons() -> None:
    with pytest.raises(ConfigError, match=r"(?s)only native can.*\n  megatron: .*model\.dropout=0\.1"):
        plan_comparison(tiny_config({}, GPT2), ("megatron",))
    with pytest.raises(ConfigError, match="no two engines"):
        plan_comparison(tiny_config(), ("native",))
    with pytest.raises(ConfigError, match=r"none that engines share: deepspeed: .* runs no pipeline"):
        plan_comparison(tiny_config(), ("deepspeed",), "pipeline")
    with pytest.raises(ConfigError, match="--layouts=zbv is in the name of no layout"):
        plan_comparison(tiny_config(), layouts="zbv")


def test_the_layout_of_the_config_comes_last_unless_it_is_listed() -> None:
    own = tiny_config({"data": 2, "tensor": 2, "zero": 1, "recompute": "full"}, launcher={"nproc": 4})
    assert choose(own, "all")[-1].parallel["recompute"] == "full"
    listed = tiny_config({"data": 2, "zero": 1}, data={"microbatch": 2}, launcher={"nproc": 2})
    assert choose(listed, "all") == list(CASES)


def test_all_six_ordered_pairs_switch_in_the_first_layout_they_share() -> None:
    plan = plan_comparison(tiny_config())
    switches = [(one, other) for one, other, _ in plan.switches()]
    assert len(switches) == len(set(switches)) == 6
    assert {case.name for *_, case in plan.switches()} == {CASES[0].name}
    fewer = plan_comparison(tiny_config(), layouts="pipeline")
    assert {(one, other) for one, other, _ in fewer.switches()} == {("native", "megatron"), ("megatron", "native")}


def test_an_engine_that_cannot_be_built_after_all_leaves_the_plan() -> None:
    both = Plan(ENGINES, (Shared(CASES[0], ENGINES), Shared(CASES[7], (ONE, THREE))), {}, {})
    plan = both.without(THREE, "pip install it")
    assert plan == Plan((ONE, TWO), (Shared(CASES[0], (ONE, TWO)),), {THREE: "pip install it"}, {})
    with pytest.raises(ConfigError, match="megatron: pip install it"):
        plan.without(TWO, "nor this")
    with pytest.raises(ConfigError, match="only native can"):
        Plan(ENGINES, (Shared(CASES[7], (ONE, THREE)),), {}, {}).without(THREE, "its layout was all there was")


def test_every_setting_of_an_engine_is_kept_by_its_engine_alone() -> None:
    own = [key for keys in OWN_SETTINGS.values() for key in keys]
    assert sorted([*own, "name"]) == sorted(EngineConfig.model_fields)
    changed: dict[str, Any] = {"offload_to": "nvme", "nvme_path": "/x", "fp8": "hybrid", "overlap": False}
    config = tiny_config(engine=changed)
    for name in ENGINES:
        kept = on_engine(config, name).engine
        assert kept.name == name
        for key, value in changed.items():
            default = EngineConfig.model_fields[key].default
            assert getattr(kept, key) == (value if key in OWN_SETTINGS[name] else default)


def test_engines_are_read_from_a_list() -> None:
    assert read_names("engine", "all") == ENGINES
    assert read_names("engine", "megatron, native,megatron") == ("megatron", "native")
    assert with_reference(("megatron", "native")) == ("native", "megatron")
    for text in ("", "native,", "fairscale"):
        with pytest.raises(ConfigError, match="is no engine"):
            read_names("--engines", text)
