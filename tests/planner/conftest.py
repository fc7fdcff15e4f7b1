"""Third-party tables that some tests read: DIST_LLM_ANCHORS names their folder, which is never in the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def anchors() -> Path:
    """Return the folder of third-party tables; skip where there is none."""
    folder = os.environ.get("DIST_LLM_ANCHORS")
    if not folder:
        pytest.skip("DIST_LLM_ANCHORS names no folder of third-party tables")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"DIST_LLM_ANCHORS={folder} is no folder")
    return path
