"""Ranks that prepared other tokens than rank 0 end before the first step, with an error that names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from dist_llm.checkpoint.agreement import connect
from dist_llm.data.prepared import PreparedData
from dist_llm.errors import DataError
from dist_llm.runtime.mesh import build_control_group
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.setup import require_same_data


def compare(fingerprints: list[str]) -> None:
    """Prepare other data on each rank, as `fingerprints` says."""
    prepared = PreparedData(Path("tokens"), Path("tokenizer.model"), 9, 1, fingerprints[dist.get_rank()], "a tokenizer")
    require_same_data(connect(build_control_group(30.0)), prepared)


def test_ranks_with_the_same_data_go_on(pool: WorkerPool) -> None:
    pool.run(compare, ["one"] * 3, world=3)


def test_ranks_with_other_data_are_named(pool: WorkerPool) -> None:
    with pytest.raises(DataError, match="other text for ranks 1, 2 than for rank 0"):
        pool.run(compare, ["one", "another", "a third"], world=3)
