"""What travels between stages does so while they compute: receives are posted ahead, and nothing waits to send."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from dist_llm.config.run import RunConfig
from dist_llm.parallel import pipeline
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.tiny import build, random_batch, tiny_config

COMPUTATIONS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


def transfers_of_a_step(config: RunConfig) -> list[tuple[str, int]]:
    """Return (what happens, which transfer) in order: computations, transfers that begin and those waited for."""
    engine = build(config)
    events: list[tuple[str, int]] = []
    numbers: dict[int, tuple[str, int]] = {}
    batch, wait = schedules._batch_p2p, schedules._wait_batch_p2p

    def begin(operations: list[dist.P2POp], desc: str | None = None) -> list[dist.Work]:
        works = batch(operations, desc)
        if operations:
            kind = "receive" if all(each.op is dist.irecv for each in operations) else "send"
            numbers[id(works)] = (kind, len(events))
            events.append(numbers[id(works)])
            kept.append(works)
        return works

    def end(works: list[dist.Work]) -> None:
        if works:
            kind, number = numbers[id(works)]
            events.append((f"wait to {kind}", number))
        wait(works)

    def noted(computation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            events.append(("compute", len(events)))
            return computation(*args, **kwargs)

        return run

    kept: list[list[dist.Work]] = []
    with ExitStack() as stack:
        engine.train_step(random_batch(config, engine.data_slice, 0))
        stack.enter_context(patch.object(schedules, "_batch_p2p", begin))
        stack.enter_context(patch.object(schedules, "_wait_batch_p2p", end))
        for name in COMPUTATIONS:
            stack.enter_context(patch.object(pipeline._Stage, name, noted(getattr(pipeline._Stage, name))))
        engine.train_step(random_batch(config, engine.data_slice, 1))
    return events


def beside(events: list[tuple[str, int]], what: str) -> tuple[int, int]:
    """Return how many sends or receives have a computation between their beginning and the wait, and how many are."""
    began = {number: at for at, (kind, number) in enumerate(events) if kind == what}
    ended = {number: at for at, (kind, number) in enumerate(events) if kind == f"wait to {what}"}
    assert began.keys() == ended.keys()
    return sum(any(kind == "compute" for kind, _ in events[began[n] : ended[n]]) for n in began), len(began)


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble", "zbv", "dualpipev"])
def test_stages_compute_while_hidden_states_travel(pool: WorkerPool, schedule: str) -> None:
    parallel = {"pipeline": 2, "schedule": schedule, "virtual_pipeline": 2 if schedule == "interleaved" else 1}
    config = tiny_config({"zero": 0, **parallel}, {"tie_embeddings": False})
    for events in pool.run(transfers_of_a_step, config, world=2):
        sent, sends = beside(events, "send")
        received, receives = beside(events, "receive")
        # What is sent last of all has nothing to travel beside; before torch 2.15 all others wait for the end.
        assert sent >= sends - 2 > 0
        assert received >= 1
        assert receives > 0


def test_one_forward_one_backward_waits_only_where_it_depends(pool: WorkerPool) -> None:
    """The steady phase of 1F1B has nothing else to compute; its warm-up sends while it does."""
    config = tiny_config({"zero": 0, "pipeline": 4}, {"tie_embeddings": False}, {"microbatch": 1})
    events = pool.run(transfers_of_a_step, config, world=4)[0]
    sends = [at for at, (kind, _) in enumerate(events) if kind == "send"]
    first = events[sends[0] :]
    waited = next(
        at for at, (kind, number) in enumerate(first) if (kind, number) == ("wait to send", events[sends[0]][1])
    )
    assert "compute" in {kind for kind, _ in first[:waited]}
