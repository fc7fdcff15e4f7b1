"""What a refusal proposes has been tried: taken alone, or all that change together, it has a plan."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from dist_llm.cli.main import main
from dist_llm.config.families import usual_head_width
from dist_llm.config.request import PlanRequest
from dist_llm.errors import ConfigError, ExitCode, Violation
from dist_llm.planner.cures import NOTHING, NoPlan, cured

REFUSED = [
    "budget.flops=1e22 cluster=gb200 cluster.nodes=2 cluster.memory_gib=1",
    "budget.gpu_hours=1.21 cluster=gb200 cluster.nodes=1 model.hidden_size=100000 data.global_batch=72",
    "budget.flops=1e24 cluster=h100-sxm cluster.nodes=32 model.hidden_size=1",
    "budget.flops=1e20 cluster=h100-sxm model.hidden_size=2000000000",
    "budget.flops=8.02e25 data.global_batch=3 law=hoffmann-1",
    "budget.flops=1.6e18 cluster=b200 cluster.nodes=6 data.tokens=1000",
    "budget.gpu_hours=1e-9 cluster=h100-sxm cluster.nodes=7 data.global_batch=7",
    "budget.flops=1.06e18 cluster=b200 cluster.nodes=13 model=llama2-70b parallel.context=3 "
    "parallel.recompute=selective",
    "budget.flops=5.68e25 cluster=h100-pcie cluster.nodes=5 data.global_batch=3",
    "budget.flops=2.11e22 cluster=cpu cluster.nodes=13 model.num_layers=500 data.global_batch=48",
    "budget.flops=4.65e21 cluster=cpu cluster.nodes=5 parallel.zero=2 parallel.recompute=none data.seq_len=2",
    "budget.flops=1.56e15 cluster=a100-80gb cluster.nodes=8 model=llama2-13b parallel.tensor=2 data.microbatch=7",
    "budget.usd=6.06e4 cluster=b200 cluster.nodes=100 parallel.virtual_pipeline=3 data.global_batch=7",
    "budget.gpu_hours=24.4 cluster=h100-sxm cluster.nodes=12 model.hidden_size=768 parallel.pipeline=2 parallel.zero=1 "
    "data.global_batch=100 law=hoffmann-3",
    "budget.flops=1e22 cluster=h100-sxm cluster.nodes=2 data.seq_len=100000000",
    "budget.flops=5.49e22 cluster=a100-80gb cluster.nodes=6 model=smollm2-135m data.global_batch=7",
    "budget.gpu_hours=84100 cluster=h100-sxm cluster.nodes=7 model.hidden_size=64 parallel.tensor=6",
]


class Asked:
    """The command under --json."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def plans(self, words: list[str]) -> bool:
        """Return whether there is a plan; any other answer than a refusal is a failure."""
        code = main(["plan", *words, "--json"])
        self._capsys.readouterr()
        assert code in (ExitCode.DONE, ExitCode.CONFIG)
        return code == ExitCode.DONE

    def refused(self, words: str) -> list[dict[str, Any]]:
        """Return the violations of a refusal."""
        assert main(["plan", *words.split(), "--json"]) == ExitCode.CONFIG
        found: list[dict[str, Any]] = json.loads(self._capsys.readouterr().out)["violations"]
        return found

    def legal(self, words: str) -> dict[str, list[Any]]:
        """Return what a refusal proposes, by key."""
        return {violation["key"]: violation["legal"] for violation in self.refused(words)}


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Asked:
    """Return the command."""
    return Asked(capsys)


def _changes(violations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each change that is proposed: of what is to change together, one."""
    together = {each["key"]: each["legal"][0] for each in violations if " together with " in each["rule"]}
    alone = [(each["key"], value) for each in violations if each["key"] not in together for value in each["legal"]]
    return [*([together] if together else []), *({key: value} for key, value in alone)]


def _changed(words: str, change: dict[str, Any]) -> list[str]:
    kept = [word for word in words.split() if word.partition("=")[0] not in change]
    return [*kept, *(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in change.items())]


@pytest.mark.parametrize("words", REFUSED)
def test_all_that_is_proposed_has_a_plan(asked: Asked, words: str) -> None:
    start = time.process_time()
    violations = asked.refused(words)
    assert time.process_time() - start < 8
    given = {word.partition("=")[0] for word in words.split()}
    assert {each["key"] for each in violations} <= given | {"cluster.nodes", "cluster.memory_gib"}
    changes = _changes(violations)
    assert changes
    for change in changes:
        assert asked.plans(_changed(words, change)), change


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("budget.flops=9.61e24 cluster=mi300x cluster.nodes=1 parallel.expert=2", "must be 1 without model.moe"),
        ("budget.flops=1e20 cluster=h100-sxm parallel.context=3", "must be a multiple of 3"),
        ("budget.flops=1.6e18 cluster=b200 cluster.nodes=6 data.tokens=1000", "are the fewest that are planned"),
        ("budget.flops=1e22 cluster=gb200 cluster.nodes=4000", "must be at most 3640"),
    ],
)
def test_the_rule_that_is_broken_is_named(asked: Asked, words: str, rule: str) -> None:
    assert any(rule in each["rule"] for each in asked.refused(words))


def test_innocent_settings_are_not_blamed(asked: Asked) -> None:
    words = "budget.flops=1e21 cluster=h100-sxm cluster.nodes=2 parallel.tensor=3 parallel.zero=1 data.microbatch=1"
    assert asked.legal(words).keys() == {"parallel.tensor"}
    hidden = "budget.flops=1e20 cluster=h100-sxm model.hidden_size=64 model.vocab_size=1000 parallel.zero=1"
    assert asked.legal(hidden) == {"model.hidden_size": [None]}


def test_plenty_of_text_is_not_refused(asked: Asked) -> None:
    assert asked.plans("budget.flops=1e14 cluster=cpu data.tokens=1e12".split())
    assert "data.tokens" in asked.legal("budget.flops=1e20 cluster=h100-sxm data.tokens=2")


@pytest.mark.parametrize(
    "words",
    [
        "budget.gpu_hours=67.59 cluster=h100-sxm cluster.nodes=7 data.global_batch=7 law=hoffmann-2",
        "budget.gpu_hours=0.001268 cluster=h100-sxm",
        "budget.gpu_hours=16 cluster=cpu serving.tokens=2.16e12",
    ],
)
def test_few_hours_that_are_enough_have_a_plan(asked: Asked, words: str) -> None:
    assert asked.plans(words.split())


def test_the_hours_of_the_smallest_plan_are_hardly_raised(asked: Asked) -> None:
    (least,) = asked.refused("budget.gpu_hours=1e-6 cluster=h100-sxm")
    needed = float(least["rule"].partition("takes ")[2].split()[0])
    assert needed < least["legal"][0] < 1.2 * needed


def _request() -> PlanRequest:
    from dist_llm.cli.compose import compose_request
    from dist_llm.config.decode import decode_as

    words = ["budget.flops=1e20", "cluster=h100-sxm", "parallel.tensor=3", "data.global_batch=7"]
    return decode_as(PlanRequest, compose_request(words).tree).config


def test_where_nothing_helps_that_is_said() -> None:
    why = Violation("parallel.tensor", 3, "is odd", (2, 4))
    (said,) = cured(_request(), NoPlan([why], [why]), lambda asked, until: False).violations
    assert (said.rule, said.legal) == (f"is odd{NOTHING}", ())


def test_suspects_that_do_not_help_are_not_said() -> None:
    batch, tensor = (Violation(key, 7, "is odd", (8, 4)) for key in ("data.global_batch", "parallel.tensor"))
    found = cured(_request(), NoPlan([batch], [tensor]), lambda asked, until: asked.data.global_batch == 4)
    assert [(each.key, each.legal) for each in found.violations] == [("data.global_batch", (4,))]


def test_the_fewest_settings_change_together() -> None:
    def has_plan(asked: PlanRequest, until: float) -> bool:
        return asked.parallel.tensor in (None, 4) and asked.cluster.nodes == 4

    error = NoPlan([Violation("cluster.nodes", 1, "is few", (2, 4))])
    found = cured(_request(), error, has_plan).violations
    assert {each.key: each.legal for each in found} == {"parallel.tensor": (4,), "cluster.nodes": (4,)}
    assert all("together with" in each.rule for each in found)


def test_nothing_is_tried_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(asked: PlanRequest, until: float) -> bool:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return False

    start = time.process_time()
    error: ConfigError = NoPlan([Violation("cluster.nodes", 1, "is few", tuple(range(2, 200)))])
    assert not any(each.legal for each in cured(_request(), error, slow).violations)
    assert time.process_time() - start < 4.5


@pytest.mark.parametrize(
    ("hidden", "wanted", "width"),
    [(5200, 128, 130), (2064, 128, 172), (5000, 128, 100), (960, 128, 64), (4096, 128, 128)],
)
def test_heads_are_about_as_wide_as_wanted(hidden: int, wanted: int, width: int) -> None:
    assert usual_head_width(hidden, wanted) == width
