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
]


@pytest.mark.parametrize("pinned", PINNED, ids=" ".join)
def test_the_plan_has_what_is_fixed(plan: Plan, tmp_path: Path, pinned: tuple[str, ...]) -> None:
    file = tmp_path / "plan.yaml"
    found = plan(*GIVEN, *pinned, "--write", str(file))
    assert found["layouts"]
    config = decode(read_document(file)).model_dump(mode="json")
    for word in pinned:
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        assert str(config[section][name]).lower() == value


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
        (["parallel.tensor=3"], r"parallel\.tensor=3 leaves no layout of .*; use 4, 2 or "),
        (["parallel.data=5", "parallel.tensor=2"], r"1 setting.*parallel\.data=5 leaves .*; use 4, 8 or "),
        (["parallel.schedule=dualpipev", "parallel.pipeline=1"], r"parallel\.pipeline=1 .*; use 2, 4 or "),
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


def test_what_is_named_would_do(refused: Callable[..., str], plan: Plan) -> None:
    words = ["data.microbatch=16", "parallel.recompute=none", "parallel.tensor=1"]
    fits = r"(parallel\.\w+|data\.microbatch)=\w+ leaves no layout that fits.*; use (\w+)"
    found = re.search(fits, refused(*GIVEN, *words))
    assert found is not None
    rest = [word for word in words if not word.startswith(found[1])]
    assert plan(*GIVEN, *rest, f"{found[1]}={found[2]}")["layouts"]
