"""The tour quotes the code as it is: every line of an excerpt is a line of one of the files its section names."""

from __future__ import annotations

import re

import pytest

from tests.contracts.source import ROOT

TOUR = ROOT / "docs" / "tour.md"
_EXCERPT = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`(?:dist_llm/)?([a-z_]+/[a-z_]+\.py)")
_NAME = re.compile(r"`(?:dist_llm/)?([a-z_]+/[a-z_]+\.py):([\w.]+)`")


def unquoted_lines(text: str) -> list[str]:
    """Return the lines of excerpts that none of the files named in their section contains; comments are left out."""
    findings = []
    for section in text.split("\n## ")[1:]:
        files = [ROOT / "dist_llm" / name for name in _FILE.findall(section)]
        code = {_bare(line) for file in files if file.exists() for line in file.read_text().splitlines()}
        quoted = [_bare(line) for excerpt in _EXCERPT.findall(section) for line in excerpt.splitlines()]
        findings += [line for line in quoted if line not in ("", "...") and line not in code]
    return findings


def _bare(line: str) -> str:
    return line.split("  #")[0].strip()


def missing_names(text: str) -> list[str]:
    """Return the `file.py:name` mentions whose file does not define the last part of the name."""
    findings = []
    for file, name in _NAME.findall(text):
        source = ROOT / "dist_llm" / file
        last = name.rpartition(".")[2]
        known = source.exists() and re.search(
            rf"^\s*(?:(?:def|class) {last}\b|{last}\b.* = )", source.read_text(), re.M
        )
        if not known:
            findings.append(f"{file}:{name}")
    return findings


def test_the_tour_quotes_the_code() -> None:
    text = TOUR.read_text(encoding="utf-8")
    assert not unquoted_lines(text), "\n".join(unquoted_lines(text))
    assert not missing_names(text)
    assert len(_EXCERPT.findall(text)) >= 8


@pytest.mark.parametrize("old", ["result = engine.train_step(source.batch(step))", "model.tie(module)"])
def test_a_stale_excerpt_is_seen(old: str) -> None:
    text = TOUR.read_text(encoding="utf-8")
    assert unquoted_lines(text.replace(old, "result = engine.step()")) == ["result = engine.step()"]


def test_a_stale_name_is_seen() -> None:
    assert missing_names("see `train/loop.py:loop` and `train/loop.py:fit`") == ["train/loop.py:fit"]
