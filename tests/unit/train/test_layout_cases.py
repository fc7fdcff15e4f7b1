"""The layouts of `verify layout` hold every legal pair of features, and are legal themselves."""

from __future__ import annotations

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.train.layout_cases import CASES
from dist_llm.train.layouts import Case
from tests.parallel.tiny import tiny_config
from tests.unit.train.pairs import as_line, broken_rules, features, held, legal_case, pairs, suggest

FORBIDDEN = {
    ("expert", "as-given"),
    ("expert", "untied"),
    ("expert", "odd-vocabulary"),
    ("expert", "gpt2"),
    ("expert", "gpt2-untied"),
    ("zero 0", "replicate"),
    ("zero 0", "offload parameters"),
}
"""By rule expert_divides_experts (these models have none), replicas_need_shards, and that of offload."""


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return tiny_config(data={"microbatch": 2})


def axes(case: Case) -> set[str]:
    """Return the axes of a case that have more than one rank."""
    return {key for key in ("tensor", "pipeline", "context", "data", "expert") if int(str(case.settings[key])) > 1}


def test_there_are_many_and_a_few_of_them_are_quick() -> None:
    assert len(CASES) >= 60
    assert sum(case.quick for case in CASES) == 16
    assert all(case.ranks <= 8 for case in CASES if case.quick)
    assert len([case for case in CASES if len(axes(case)) >= 4]) >= 10
    assert {case.variant for case in CASES if len(axes(case)) >= 4} >= {
        "as-given",
        "gpt2",
        "experts",
        "experts-sigmoid",
    }


def test_each_case_breaks_no_rule(config: RunConfig) -> None:
    assert {case.name: broken_rules(config, case) for case in CASES if broken_rules(config, case)} == {}


def test_every_feature_is_in_a_quick_case() -> None:
    listed = features(CASES)
    quick = [case for case in CASES if case.quick]
    assert [feature.name for feature in listed if not any(feature.of(case) for case in quick)] == []


def test_every_legal_pair_occurs(config: RunConfig) -> None:
    """A new setting or variant that a case has must meet all others: the lines to add are said."""
    listed = features(CASES)
    there = held(CASES, listed)
    missing = [pair for pair in pairs(listed) if pair not in there]
    forbidden = [pair for pair in missing if legal_case(config, pair, listed) is None]
    assert {(a.name, b.name) for a, b in forbidden} == FORBIDDEN
    lacking = [pair for pair in missing if pair not in forbidden]
    assert not lacking, "add to CASES:\n" + "\n".join(as_line(case) for case in suggest(config, lacking, listed))


def test_a_lost_case_is_missed_and_a_case_for_it_proposed(config: RunConfig) -> None:
    listed = features(CASES)
    fewer = [case for case in CASES if case.settings["schedule"] != "dualpipev"]
    lost = sorted(held(CASES, listed) - held(fewer, listed), key=lambda pair: (pair[0].name, pair[1].name))
    assert len(lost) >= 15
    proposed = suggest(config, lost[:4], listed)
    assert set(lost[:4]) <= held(proposed, listed)
    assert all(broken_rules(config, case) is None for case in proposed)
