"""The ledger sees every way to issue a collective, once, with its bytes: plain, coalesced, functional, sends."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from dist_llm.runtime.ledger import CollectiveLedger
from dist_llm.runtime.pool import WorkerPool


def issued(name: str) -> dict[str, list[int]]:
    """Issue one collective of a name on 4 floats a rank, and return what the ledger saw."""
    one, both = torch.ones(4), torch.ones(8)
    peer = 1 - dist.get_rank()
    world = dist.group.WORLD
    with CollectiveLedger() as ledger:
        match name:
            case "all_reduce":
                dist.all_reduce(one)
            case "functional all_reduce":
                functional.all_reduce(one, "sum", world).sum()
            case "coalesced all_reduce":
                with dist._coalescing_manager(world):
                    dist.all_reduce(one)
                    dist.all_reduce(both)
            case "all_gather":
                dist.all_gather_into_tensor(both, one)
            case "all_gather of a list":
                dist.all_gather([torch.ones(4), torch.ones(4)], one)
            case "functional all_gather":
                functional.all_gather_tensor(one, 0, world).sum()
            case "reduce_scatter":
                dist.reduce_scatter_tensor(one, both)
            case "functional reduce_scatter":
                functional.reduce_scatter_tensor(both, "sum", 0, world).sum()
            case "all_to_all":
                dist.all_to_all_single(torch.empty(8), both)
            case "broadcast":
                dist.broadcast(one, 0)
            case "reduce":
                dist.reduce(one, 0)
            case "barrier":
                dist.barrier()
            case "sends":
                sends = [dist.P2POp(dist.isend, one, peer), dist.P2POp(dist.irecv, torch.empty(8), peer)]
                sends += [dist.P2POp(dist.isend, both, peer), dist.P2POp(dist.irecv, torch.empty(4), peer)]
                sends[1], sends[3] = sends[3], sends[1]
                for request in dist.batch_isend_irecv(sends):
                    request.wait()
            case "gradients":
                weight = torch.ones(4, requires_grad=True)
                weight.register_hook(lambda gradient: dist.all_reduce(gradient))
                weight.sum().backward()
    return ledger.by_kind()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all_reduce", {"all_reduce": [1, 16, 16]}),
        ("functional all_reduce", {"all_reduce": [1, 16, 16]}),
        ("coalesced all_reduce", {"all_reduce": [1, 48, 48]}),
        ("all_gather", {"all_gather": [1, 32, 16]}),
        ("all_gather of a list", {"all_gather": [1, 32, 16]}),
        ("functional all_gather", {"all_gather": [1, 32, 16]}),
        ("reduce_scatter", {"reduce_scatter": [1, 32, 16]}),
        ("functional reduce_scatter", {"reduce_scatter": [1, 32, 16]}),
        ("all_to_all", {"all_to_all": [1, 32, 16]}),
        ("broadcast", {"broadcast": [1, 16, 8]}),
        ("reduce", {"reduce": [1, 16, 8]}),
        ("barrier", {"barrier": [1, 0, 0]}),
        ("sends", {"send": [2, 48, 48]}),
        ("gradients", {"all_reduce": [1, 16, 16]}),
    ],
    ids=str,
)
def test_each_is_seen_once(pool: WorkerPool, name: str, expected: dict[str, list[int]]) -> None:
    assert pool.run(issued, name, world=2) == [expected, expected]
