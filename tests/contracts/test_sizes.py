"""Sizes, names and docstrings hold over the whole repository; each rule is first seen to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.contracts.sizes import long_files, long_functions, many_arguments, missing_docstrings, vague_names
from tests.contracts.source import ROOT, Source, python_sources, repository_files

Rule = Callable[[Source], Iterator[str]]
SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".sh", ".sbatch")


def _all(rule: Rule, *folders: str) -> str:
    return "\n".join(finding for source in python_sources(*folders) for finding in rule(source))


def test_files_are_short() -> None:
    names = [name for name in repository_files() if name.endswith(SOURCE_SUFFIXES)]
    findings = [finding for name in names for finding in long_files(name, (ROOT / name).read_text())]
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize("rule", [long_functions, many_arguments, vague_names], ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    findings = _all(rule)
    assert not findings, findings


def test_the_package_is_documented() -> None:
    findings = _all(missing_docstrings, "dist_llm")
    assert not findings, findings


def _source(text: str, path: str = "dist_llm/example.py") -> Source:
    return Source(path, text)


def test_long_files_is_seen() -> None:
    assert not list(long_files("a.py", "x\n" * 400))
    assert list(long_files("a.py", "x\n" * 401)) == ["a.py:1: 401 lines; at most 400"]


def test_long_functions_is_seen() -> None:
    sixty = "def f():\n" + "    x = 1\n" * 59
    assert not list(long_functions(_source(sixty)))
    assert list(long_functions(_source(sixty + "    x = 2\n"))) == ["dist_llm/example.py:1: f has 61 lines; at most 60"]
    nested = "class A:\n    def f(self):\n" + "        x = 1\n" * 60
    assert len(list(long_functions(_source(nested)))) == 1


@pytest.mark.parametrize(
    ("signature", "findings"),
    [
        ("a, b, c, d, e, f, g", 0),
        ("self, a, b, c, d, e, f, g", 0),
        ("a, b, c, d, e, f, g, h", 1),
        ("a, b, c, d, *, e, f, g, h", 1),
        ("a, b, c, d, e, f, *args, **kwargs", 1),
    ],
)
def test_many_arguments_is_seen(signature: str, findings: int) -> None:
    assert len(list(many_arguments(_source(f"def f({signature}): ...")))) == findings


@pytest.mark.parametrize("path", ["dist_llm/utils.py", "dist_llm/data/text_utils.py", "dist_llm/common/a.py"])
def test_vague_names_is_seen(path: str) -> None:
    assert len(list(vague_names(_source("", path)))) == 1
    assert not list(vague_names(_source("", "dist_llm/data/loader.py")))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ('"""A."""\ndef f():\n    """Do."""\n', []),
        ("x = 1\n", ["module"]),
        ('"""A."""\ndef f(): ...\n', ["f"]),
        ('"""A."""\ndef _f(): ...\n', []),
        ('"""A."""\nclass A:\n    def f(self): ...\n', ["A", "f"]),
        ('"""A."""\nclass A:\n    """B."""\n    @override\n    def f(self): ...\n', []),
        ('"""A.\n' + "b\n" * 11 + '"""\n', ["module"]),
    ],
)
def test_missing_docstrings_is_seen(text: str, missing: list[str]) -> None:
    found = [finding.split(": ")[1].split()[0] for finding in missing_docstrings(_source(text))]
    assert found == missing
