"""`verify layout` takes nothing for agreement that is not: NaN, a missing rectangle, a batch that cannot be cut."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest

from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train import verify
from dist_llm.train.compare import compare
from dist_llm.train.layout_cases import CASES
from dist_llm.train.layouts import Case, baseline, case_config, given, misfit
from dist_llm.train.trace import KeyBias, Look, Trace
from dist_llm.train.verify import choose, excluded_settings, refusal, verify_layout
from tests.parallel.tiny import GPT2, build, random_batch, tiny_config

CASE = Case("as-given", {"data": 2}, 2, 1)


def trace(rows: slice, bias_share: float = 0.0) -> Trace:
    """Return what a rank with these rows of a 4 x 3 weight left."""
    whole = np.arange(1.0, 13.0, dtype=np.float32).reshape(4, 3)
    return Trace(
        losses=[2.0, 1.5],
        grad_norms=[1.0, 0.5],
        weights=[("w", (4, 3), (rows.start, 0), whole[rows].copy())],
        key_bias_shares=[{"layers.0.attention.wk.bias": bias_share}] * 2,
    )


ONE = [trace(slice(0, 4))]
TWO = [trace(slice(0, 2)), trace(slice(2, 4))]


def verdict(traces: list[Trace]) -> bool:
    """Compare with one process at fp32 bounds."""
    return compare(CASE, traces, ONE, "fp32", 0.0).ok


def test_equal_pieces_agree() -> None:
    assert verdict(TWO)


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0 * (1 + 3e-5)])
def test_another_loss_or_norm_is_red(value: float) -> None:
    for field in ("losses", "grad_norms"):
        wrong = deepcopy(TWO)
        getattr(wrong[1], field)[0] = value
        assert not verdict(wrong)


@pytest.mark.parametrize("value", [math.nan, 1.01])
def test_another_weight_is_red(value: float) -> None:
    wrong = deepcopy(TWO)
    wrong[0].weights[0][3][0, 0] = value
    assert not verdict(wrong)


def test_a_missing_rectangle_is_red() -> None:
    assert not verdict(TWO[:1])


def test_a_missing_weight_is_red() -> None:
    assert not verdict([Trace([2.0, 1.5], [1.0, 0.5])])


def test_a_key_bias_that_learns_is_red() -> None:
    assert not verdict([trace(slice(0, 2), 2e-6), TWO[1]])


def test_the_cases_hold_what_they_say() -> None:
    config = tiny_config()
    assert len({case.name for case in CASES}) == len(CASES) >= 16
    for case in CASES:
        assert misfit(config, case) is None
        data = case_config(config, case, "fp32").data
        shares = int(str(case.parallel.get("data", 1)))
        assert data.global_batch == shares * case.accumulation * data.microbatch
    assert case_config(config, baseline("as-given"), "fp32").data.microbatch == config.data.global_batch


def test_the_layout_of_the_config_comes_first_once() -> None:
    config = tiny_config({"tensor": 4, "recompute": "full"}, launcher={"nproc": 4})
    own = given(config)
    assert case_config(config, own, "fp32").parallel.recompute == "full"
    assert [case.name for case in choose(config, "all")][:1] == [own.name]
    known = tiny_config({"tensor": 2, "zero": 0}, data={"microbatch": 2}, launcher={"nproc": 2})
    assert len(choose(known, "all")) == len(CASES)
    assert len(choose(tiny_config(), "all")) == len(CASES)


def test_a_layout_without_a_launcher_gets_the_fewest_ranks() -> None:
    assert given(tiny_config({"tensor": 2, "pipeline": 2}, launcher={"nproc": 1})).ranks == 4
    assert given(tiny_config({"replicate": 2, "zero": 3}, launcher={"nproc": 1})).ranks == 2
    assert given(tiny_config({"tensor": 2}, launcher={"nproc": 8})).ranks == 8


def test_a_layout_of_many_ranks_is_not_tried_on_one_machine() -> None:
    config = tiny_config(data={"global_batch": 64}, launcher={"nproc": 64})
    assert "64 ranks" in str(misfit(config, given(config)))


@pytest.mark.parametrize(
    ("parallel", "ranks", "key"),
    [({"tensor": 2, "pipeline": 2}, 6, "ranks"), ({"tensor": 2, "data": 3}, 6, "data.global_batch")],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_starts(
    parallel: dict[str, object], ranks: int, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "prepare", None)
    with pytest.raises(ConfigError) as caught:
        verify_layout(tiny_config(parallel, launcher={"nproc": ranks}))
    assert key in {violation.key for violation in caught.value.violations}


def test_a_choice_of_layouts_that_cannot_be_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "prepare", None)
    with pytest.raises(ConfigError, match="cannot be tried"):
        verify_layout(tiny_config(model={"num_layers": 1}), layouts="as-given ranks=2 pipeline=2")


def test_fused_accumulation_is_compared_where_it_exists() -> None:
    config = tiny_config({"fused_accumulation": True}, precision={"name": "bf16"}, launcher={"nproc": 2})
    assert not case_config(config, given(config), "fp32").parallel.fused_accumulation
    assert case_config(config, given(config), "bf16").parallel.fused_accumulation
    assert excluded_settings(config, "fp32").keys() == {"parallel.fused_accumulation"}
    assert excluded_settings(config, "bf16") == {}
    assert not refusal(config, given(config), "fp32")


def test_a_text_in_no_name_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="--layouts=typo"):
        choose(tiny_config(), "typo")


def test_a_key_bias_has_no_gradient_only_where_it_is_added_alike(pool: WorkerPool) -> None:
    for model, expected in (({"bias": True}, []), ({**GPT2, "qk_norm": True}, []), (GPT2, 4 * ["wk.bias"])):
        names = pool.run(key_biases, tiny_config(model=model), world=1)[0]
        assert [name.partition("attention.")[2] for name in names] == expected


def key_biases(config: RunConfig) -> list[str]:
    """Return the key biases whose gradient `verify layout` takes for zero."""
    engine = build(config)
    watch = KeyBias(engine, config.model)
    engine.observe = watch.observe
    engine.train_step(random_batch(config, engine.data_slice, 0))
    return sorted(watch.norms[0])


def test_a_batch_that_cannot_be_cut_is_named_with_the_next_that_can() -> None:
    reason = misfit(tiny_config(data={"global_batch": 6}), Case("as-given", {"data": 2}, 2, 4))
    assert reason is not None
    assert "data.global_batch=6 must be a multiple of 8" in reason
    assert reason.endswith("use 8")


def test_attention_dropout_is_named_as_left_out() -> None:
    assert excluded_settings(tiny_config(), "fp32") == {}
    said = excluded_settings(tiny_config(model={"attention_dropout": 0.2}), "fp32")
    assert said["model.attention_dropout"].startswith("0.2 taken as 0")


def test_capacity_is_named_as_left_out_and_taken_as_dropless() -> None:
    dropping = tiny_config(model={"moe": {"num_experts": 4, "capacity_factor": 1.25}})
    said = excluded_settings(dropping, "fp32")
    assert said["model.moe.capacity_factor"].startswith("1.25 taken as null (dropless): which rows")
    assert case_config(dropping, CASE, "fp32").model.moe.capacity_factor is None
    assert excluded_settings(tiny_config(model={"moe": {"capacity_factor": 1.25}}), "fp32") == {}


def test_a_quick_choice_is_a_few_and_a_text_searches_all() -> None:
    quick = choose(tiny_config(), "all", "quick")
    assert [case.name for case in quick] == [case.name for case in CASES if case.quick]
    rare = next(case for case in CASES if not case.quick)
    assert choose(tiny_config(), rare.name, "quick") == [rare]
    own = tiny_config({"tensor": 4, "recompute": "full"}, launcher={"nproc": 4})
    assert len(choose(own, "all", "quick")) == len(quick) + 1


@pytest.mark.parametrize(("gap", "found"), [(0.4, True), (1e-3, False)])
def test_bf16_judges_the_first_gradients_and_not_the_weights(gap: float, found: bool) -> None:
    """A sum that lacks a part moves a gradient by half; rounding, by a hundredth."""
    one, other = deepcopy(ONE), deepcopy(ONE)
    one[0].look, other[0].look = (looked(1.0), looked(1.0 + gap))
    other[0].weights[0][3][:] *= 2
    row = compare(CASE, other, one, "bf16", 0.0)
    assert row.ok is not found
    assert row.worst_gradient == "w"


def looked(value: float) -> Look:
    """Return a look at a step whose only gradient holds a value."""
    return Look({"pp": 0, "dp": 0, "cp": 0, "tp": 0}, True, {}, [("w", (2,), (0,), np.full(2, value))])


def test_fp8_is_left_out_and_said() -> None:
    config = tiny_config(engine={"name": "megatron", "fp8": "hybrid"})
    assert case_config(config, baseline("as-given"), "fp32").engine.fp8 == "none"
    assert "engine.fp8" in excluded_settings(config, "fp32")
