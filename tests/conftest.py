"""What every test shares: one pool of gloo ranks, and the reason why a test marked `gpu` is skipped.

Markers and `warnings are errors` are set in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dist_llm.runtime.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """One pool for the whole run: starting ranks costs seconds, a job on them milliseconds. Starts when first used."""
    from dist_llm.runtime.pool import WorkerPool

    with WorkerPool(8, timeout_seconds=120.0) as workers:
        yield workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests without a CUDA device; torch is imported only when there is such a test."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="gpu: torch sees no CUDA device here"))
