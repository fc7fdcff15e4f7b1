"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return where a run's checkpoints go; not made yet."""
    return tmp_path / "checkpoints"
