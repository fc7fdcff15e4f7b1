"""What is imported is declared, what is declared is pinned: a clean machine gets all that code and tests need."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions
from typing import Any

from tests.contracts.source import ROOT, Source, imported_modules, python_sources

OWN = {"dist_llm", "tests", "docs", "benchmarks"}
OPTIONAL: dict[str, str | tuple[str, ...]] = {
    "deepspeed": "dist_llm/engine/deepspeed",
    "megatron": "dist_llm/engine/megatron",
    "transformer_engine": ("dist_llm/engine/megatron", "dist_llm/ops/transformer_engine.py"),
    "transformer_engine_torch": "dist_llm/ops/transformer_engine.py",
    "apex": ("dist_llm/engine/megatron", "dist_llm/ops/apex.py"),
    "wandb": "dist_llm/telemetry/wandb.py",
    "triton": "dist_llm/ops/triton/",
}
"""Optional packages, and how the names of those files begin that may import them."""
FOR_TESTS = ("dev", "deepspeed", "megatron")
"""The extras that `make setup` installs."""


@cache
def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _names(requirements: Iterable[str]) -> set[str]:
    return {_plain(re.split(r"[<>=!~\[; ]", requirement)[0]) for requirement in requirements}


def undeclared(sources: Iterable[Source], declared: set[str]) -> list[str]:
    """Find imports of installed distributions that are not among the declared ones (plain names)."""
    known = packages_distributions()
    findings = []
    for source in sources:
        for node, module in imported_modules(source.tree):
            top = module.partition(".")[0]
            owned = top in OPTIONAL and source.path.startswith(OPTIONAL[top])
            if top in sys.stdlib_module_names or top in OWN or owned:
                continue
            if not {_plain(name) for name in known.get(top, ())} & declared:
                findings.append(source.at(node, f"{top} is not declared in pyproject.toml"))
    return findings


def unpinned(requirements: Iterable[str], constraints: str) -> set[str]:
    """Name the requirements that no `name==version` line pins."""
    return _names(requirements) - _names(line for line in constraints.splitlines() if "==" in line)


def test_the_package_imports_what_it_declares() -> None:
    findings = undeclared(python_sources("dist_llm"), _names(_project()["dependencies"]))
    assert not findings, "\n".join(findings)


def _for_tests() -> list[str]:
    extras = _project()["optional-dependencies"]
    return [*_project()["dependencies"], *(requirement for extra in FOR_TESTS for requirement in extras[extra])]


def test_setup_installs_what_tests_need() -> None:
    assert f"'.[{','.join(FOR_TESTS)}]'" in (ROOT / "Makefile").read_text()


def test_tests_import_what_is_declared_for_them() -> None:
    declared = _names(_for_tests())
    findings = undeclared(python_sources("tests", "docs", "benchmarks"), declared)
    assert not findings, "\n".join(findings)


def test_direct_dependencies_are_pinned() -> None:
    assert unpinned(_for_tests(), (ROOT / "constraints.txt").read_text()) == set()


def test_undeclared_is_seen() -> None:
    text = "import os\nimport yaml\nfrom dist_llm import errors\nimport nowhere_to_be_found\nimport deepspeed\n"
    found = [finding.split(": ")[1].split()[0] for finding in undeclared([Source("dist_llm/a.py", text)], {"numpy"})]
    assert found == ["yaml", "nowhere_to_be_found", "deepspeed"]
    assert not undeclared([Source("dist_llm/a.py", "import yaml")], {"pyyaml"})
    assert not undeclared([Source("dist_llm/engine/deepspeed_library.py", "import deepspeed")], set())


def test_unpinned_is_seen() -> None:
    assert unpinned(["PyYAML>=6", "torch>=2"], "# pins\npyyaml==6.0\n") == {"torch"}
