"""Answers of `dist-llm plan`, and tables of others.

Those lie outside the repository; tests that need them say so and are skipped where they are absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli.main import main
from dist_llm.errors import ExitCode

Plan = Callable[..., dict[str, Any]]
ANCHORS = "DIST_LLM_ANCHORS"


@pytest.fixture(scope="session")
def anchors() -> Path:
    """Return the folder of published tables that DIST_LLM_ANCHORS names."""
    folder = os.environ.get(ANCHORS)
    if not folder:
        pytest.skip(f"{ANCHORS} names no folder of published tables")
    return Path(folder)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Return what the command answers under --json."""

    def run(*words: str) -> dict[str, Any]:
        assert main(["plan", *words, "--json"]) == ExitCode.DONE
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what the command says when there is no plan."""

    def run(*words: str) -> str:
        assert main(["plan", *words]) == ExitCode.CONFIG
        return capsys.readouterr().err

    return run
