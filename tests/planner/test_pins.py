"""What the user fixes of the layout is so in every layout of the plan; what leaves none is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_llm.config.decode import decode
from dist_llm.config.document import read_document
from tests.planner.conftest import Plan

GIVEN = ("budget.flops=1e21", "cluster=h100-sxm", "cluster.nodes=2")

PINNED = [
    ("parallel.tensor=2", "data.microbatch=4"),
    ("parallel.pipeline=4", "parallel.schedule=zbv", "parallel.data=2"),
    ("parallel.virtual_pipeline=2", "parallel.schedule=zero_bubble"),
    ("parallel.zero=2", "parallel.recompute=full"),
    ("parallel.context=2", "parallel.sequence=false"),
    ("parallel.recompute=selective", "parallel.pipeline=2"),
    ("parallel.schedule=zbv", "parallel.pipeline=1"),
    ("parallel.sequence=true",),
    ("parallel.virtual_pipeline=1", "parallel.pipeline=2"),
    ("parallel.virtual_pipeline=1", "parallel.schedule=zbv", "parallel.pipeline=4"),
    ("parallel.virtual_pipeline=1", "engine=deepspeed"),
]


@pytest.mark.parametrize("pinned", PINNED, ids=" ".join)
def test_the_plan_has_what_is_fixed(plan: Plan, tmp_path: Path, pinned: tuple[str, ...]) -> None:
    file = tmp_path / "plan.yaml"
    found = plan(*GIVEN, *pinned, "--write", str(file))
    assert found["layouts"]
    config = decode(read_document(file)).model_dump(mode="json")
    assert not config["parallel"]["sequence"] or config["parallel"]["tensor"] > 1
    for word in pinned:
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        assert str(config[section][name or "name"]).lower() == value


@pytest.mark.parametrize("default", ["parallel.virtual_pipeline=1", "parallel.schedule=1f1b"])
def test_fixing_a_default_costs_nothing(plan: Plan, default: str) -> None:
    free, pinned = (plan(*GIVEN, *more)["layouts"][0] for more in ([], [default]))
    assert pinned["step_seconds"] == free["step_seconds"]


def test_heads_split_over_the_tensor_ranks_that_are_fixed(plan: Plan) -> None:
    free, pinned = (
        plan("budget.flops=1e19", "cluster=h100-sxm", *more)["model"] for more in ([], ["parallel.tensor=8"])
    )
    assert free["num_heads"] % 8
    assert pinned["num_heads"] % 8 == pinned["num_kv_heads"] % 8 == 0
    assert abs(pinned["num_params"] / free["num_params"] - 1) < 0.2


def test_all_layouts_have_it(plan: Plan) -> None:
    free = plan(*GIVEN, "--top", "999")
    pinned = plan(*GIVEN, "parallel.tensor=4", "--top", "999")
    names = [each["name"] for each in pinned["layouts"]]
    assert all("tp4" in name.split() for name in names)
    assert names == [each["name"] for each in free["layouts"] if "tp4" in each["name"].split()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["parallel.tensor=3"],
            r"parallel\.tensor=3 leaves .*: 16 devices must be a multiple of 3 .*; use 4, 2 or ",
        ),
        (
            ["parallel.context=3"],
            r"parallel\.context=3 leaves .*: 16 devices must be a multiple of 3 .*; use 4, 2 or 8",
        ),
        (["parallel.replicate=2"], r"parallel\.replicate=2 is a setting of a run, not of this command"),
        (["parallel.data=5", "parallel.tensor=2"], r"1 setting.*parallel\.data=5 leaves .*; use 4, 8 or "),
        (["parallel.virtual_pipeline=2", "parallel.pipeline=1"], r"parallel\.pipeline=1 .*; use 2, 4 or "),
        (["parallel.tensor=16", "model.num_heads=12"], r"parallel\.tensor=16 .*\n *model\.num_heads=12 "),
        (["parallel.expert=2"], r"parallel\.expert=2 leaves no layout .*; use 1"),
        (
            ["data.microbatch=16", "parallel.recompute=none", "parallel.tensor=1", "parallel.pipeline=1"],
            r"leaves no layout that fits: the smallest .* needs .* GiB a device; use",
        ),
        (["parallel.zero=4"], r"parallel\.zero=4 is not one of its choices"),
    ],
)
def test_what_leaves_no_layout_is_named(refused: Callable[..., str], words: list[str], said: str) -> None:
    assert re.search(said, refused(*GIVEN, *words), re.DOTALL)


@pytest.mark.parametrize(
    "words",
    [
        ["data.microbatch=16", "parallel.recompute=none", "parallel.tensor=1"],
        ["parallel.pipeline=5"],
        ["parallel.data=3", "parallel.zero=2"],
        ["parallel.context=3", "data.microbatch=2"],
    ],
    ids=" ".join,
)
def test_each_value_that_is_named_would_do(refused: Callable[..., str], plan: Plan, words: list[str]) -> None:
    named = re.findall(r"((?:parallel|data)\.\w+)=\w+ leaves no .*; use (.+)", refused(*GIVEN, *words))
    assert named
    for key, values in named:
        rest = [word for word in words if not word.startswith(key)]
        for value in re.split(", | or ", values):
            assert plan(*GIVEN, *rest, f"{key}={value}")["layouts"]


def test_pins_that_are_wrong_together_are_named_together(refused: Callable[..., str], plan: Plan) -> None:
    words = ["parallel.tensor=3", "parallel.data=5", "parallel.zero=1"]
    said = refused(*GIVEN, *words)
    named = dict(re.findall(r"(parallel\.\w+)=\w+ leaves no layout .* together .*; use (\w+)", said))
    assert set(named) == {"parallel.tensor", "parallel.data"}
    assert plan(*GIVEN, "parallel.zero=1", *(f"{key}={value}" for key, value in named.items()))["layouts"]


def test_a_free_batch_fills_what_is_fixed(plan: Plan) -> None:
    found = plan("budget.flops=1e19", "cluster=h100-sxm", "parallel.data=8", "data.microbatch=32")
    assert found["batch"]["sequences"] == 256


def test_key_heads_of_large_models_split_over_a_fixed_tensor(plan: Plan) -> None:
    found = plan("budget.flops=1e22", "cluster=h100-sxm", "cluster.nodes=2", "parallel.tensor=16")
    assert found["model"]["num_kv_heads"] % 16 == 0
    assert found["model"]["num_params"] > 8e9


def test_all_chunks_are_not_weighed_for_a_fixed_schedule(plan: Plan) -> None:
    words = ("budget.flops=1e23", "cluster=h100-sxm", "cluster.nodes=8", "model=llama3-70b")
    found = plan(*words, "parallel.schedule=zero_bubble")
    assert found["num_layouts"]["weighed"] < 4000
