"""One uninterrupted run on four ranks, which the tests of this folder share: they read it or work on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.tiny_run import FOUR_RANKS, Place, run, write_corpus


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder with a corpus."""
    folder = tmp_path_factory.mktemp("e2e")
    write_corpus(folder / "corpus.txt")
    return Place(folder)


@pytest.fixture(scope="session")
def whole(place: Place) -> Path:
    """Return the folder of a run of 40 steps on 4 ranks that nothing interrupted."""
    words = place.words("whole", *FOUR_RANKS, "telemetry.sample_tokens=8")
    done = run(["launch", *words], place.folder)
    assert done.returncode == 0, done.stderr
    return place.runs / "whole"


@pytest.fixture
def copied(place: Place, whole: Path) -> Iterator[Path]:
    """Return a copy of the whole run, called `copy`, that a test may spoil."""
    target = place.runs / "copy"
    shutil.copytree(whole, target)
    yield target
    shutil.rmtree(target)
