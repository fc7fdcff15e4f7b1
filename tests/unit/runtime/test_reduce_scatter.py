"""A reduce-scatter over gloo ranks is the backend's own in value, and is seen as one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dist_llm.runtime.ledger import CollectiveLedger
from dist_llm.runtime.pool import WorkerPool
from dist_llm.runtime.reduce_scatter import reduce_scatter


def _part(rank: int, ranks: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(ranks * 3, 5, generator=torch.Generator().manual_seed(rank)).to(dtype)


def sums(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[str, list[int]]]:
    """Return this rank's part of a sum, ours and the backend's, and what the ledger saw of ours."""
    ranks, world = dist.get_world_size(), dist.group.WORLD
    assert world is not None
    x = _part(dist.get_rank(), ranks, dtype)
    ours, theirs = x.new_empty(3, 5), x.new_empty(3, 5)
    with CollectiveLedger() as ledger:
        reduce_scatter(ours, x, world)
    dist.reduce_scatter_tensor(theirs, x)
    return ours, theirs, ledger.by_kind()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_it_is_the_backends_in_value(pool: WorkerPool, ranks: int, dtype: torch.dtype) -> None:
    whole = sum(_part(rank, ranks, dtype).double() for rank in range(ranks))
    payload = ranks * 15 * dtype.itemsize
    for rank, (ours, theirs, seen) in enumerate(pool.run(sums, dtype, world=ranks)):
        exact = whole[3 * rank : 3 * rank + 3]  # type: ignore[index]
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * torch.finfo(dtype).eps)
        assert seen == {"reduce_scatter": [1, payload, payload * (ranks - 1) // ranks]}


def test_without_values_it_issues_nothing() -> None:
    out = torch.empty(3, 5, device="meta")
    torch.ops.dist_llm_c10d.reduce_scatter(out, torch.empty(6, 5, device="meta"), "no such group")
