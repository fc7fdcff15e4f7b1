"""Every combination of presets under conf/ decodes.

A preset fills the section of its group and no other (shown on its text), and sections decode apart, so all combinations
decode if every preset does: each is part of at least one composed run, each experiment is a whole one.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
import yaml

from dist_llm.cli.compose import compose
from dist_llm.config.decode import decode
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError
from tests.contracts.source import ROOT, repository_files

EXPERIMENT = "experiment"
GROUPS = {
    *("model", "parallel", "engine", "optimizer", "schedule", "precision", "data", "tokenizer", "checkpoint"),
    *("telemetry", "launcher", "cluster", EXPERIMENT),
}


def presets() -> dict[str, list[str]]:
    """List the presets of every group that ships."""
    found: dict[str, list[str]] = {}
    for path in map(PurePosixPath, repository_files()):
        if path.parts[0] == "conf" and path.suffix == ".yaml" and len(path.parts) > 2:
            found.setdefault(path.parent.relative_to("conf").as_posix(), []).append(path.stem)
    return found


def covering_runs(groups: dict[str, list[str]]) -> list[list[str]]:
    """Return overrides of as many runs as the largest group has presets; run i takes preset i of each group in turn."""
    rows = max(len(names) for names in groups.values())
    return [[f"{group}={names[i % len(names)]}" for group, names in groups.items()] for i in range(rows)]


def outside_its_section(path: str, text: str) -> list[str]:
    """Find what lets a preset fill more than the section of its group."""
    findings = [
        f"{path}: {line.strip()}" for line in text.splitlines() if line.replace(" ", "").startswith("#@package")
    ]
    return findings + [f"{path}: a defaults list" for key in yaml.safe_load(text) or {} if key == "defaults"]


def test_groups_are_those_of_the_design() -> None:
    assert presets().keys() == GROUPS


def test_presets_fill_their_own_section() -> None:
    names = [f"conf/{group}/{name}.yaml" for group, names in presets().items() for name in names if group != EXPERIMENT]
    findings = [finding for name in names for finding in outside_its_section(name, (ROOT / name).read_text())]
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        *([f"experiment={name}"] for name in presets()[EXPERIMENT]),
        *covering_runs({group: names for group, names in presets().items() if group != EXPERIMENT}),
    ],
    ids=lambda overrides: overrides[0] if overrides else "default",
)
def test_run_decodes(overrides: list[str]) -> None:
    assert isinstance(decode(compose(overrides)), RunConfig)


def test_covering_runs_cover() -> None:
    assert covering_runs({"a": ["1", "2", "3"], "b": ["x"]}) == [["a=1", "b=x"], ["a=2", "b=x"], ["a=3", "b=x"]]


def test_outside_its_section_is_seen() -> None:
    assert outside_its_section("a.yaml", "# @package _global_\nx: 1\n") == ["a.yaml: # @package _global_"]
    assert outside_its_section("a.yaml", "defaults:\n  - b\n") == ["a.yaml: a defaults list"]
    assert not outside_its_section("a.yaml", "# about a package\nx: 1\n")


def test_a_run_that_does_not_decode_is_seen() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_layers"):
        decode(compose(["model.num_layers=0"]))
