"""Tables of others lie outside the repository; tests that need them say so and are skipped where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ANCHORS = "DIST_LLM_ANCHORS"


@pytest.fixture(scope="session")
def anchors() -> Path:
    """Return the folder of published tables that DIST_LLM_ANCHORS names."""
    folder = os.environ.get(ANCHORS)
    if not folder:
        pytest.skip(f"{ANCHORS} names no folder of published tables")
    return Path(folder)
