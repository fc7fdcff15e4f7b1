"""Ranks as threads of one process, with a network of queues: what a rank tells another is seen, in its order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from dist_llm.parallel import context, ring
from dist_llm.runtime.mesh import Axis, ContextAxes

PATIENCE = 60.0
"""Seconds that a rank waits for a message before the test fails."""


@dataclass
class Network:
    """Stands in for torch.distributed in parallel/context.py and parallel/ring.py; groups are tuples of ranks."""

    log: list[list[str]]
    _boxes: dict[Any, queue.SimpleQueue[Tensor]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _here: threading.local = field(default_factory=threading.local)

    def _box(self, *key: object) -> queue.SimpleQueue[Tensor]:
        with self._lock:
            return self._boxes.setdefault(key, queue.SimpleQueue())

    def say(self, event: str) -> None:
        """Note what this rank does."""
        self.log[self._here.rank].append(event)

    def _passed(self, operations: list[Any]) -> list[Any]:
        sent, received = operations
        tag, name = sent.tag, ("keys", "gradients")[sent.tag]
        group, me = sent.group, self._here.rank
        self.say(f"post {name}")
        self._box(group, me, group[sent.group_peer], tag).put(sent.tensor.clone())

        def wait() -> None:
            self.say(f"wait {name}")
            came = self._box(group, group[received.group_peer], me, tag).get(timeout=PATIENCE)
            received.tensor.copy_(came)

        return [SimpleNamespace(wait=wait)]

    def _all_to_all(self, out: Tensor, x: Tensor, group: Any) -> None:
        me = self._here.rank
        self.say("all_to_all")
        for peer, part in zip(group, x, strict=True):
            self._box("all", group, me, peer).put(part.clone())
        for peer, part in zip(group, out, strict=True):
            part.copy_(self._box("all", group, peer, me).get(timeout=PATIENCE))

    def installed(self) -> list[AbstractContextManager[Any]]:
        """Return the patches that put this in torch.distributed's place."""

        def operation(kind: str, tensor: Tensor, **where: Any) -> Any:
            return SimpleNamespace(tensor=tensor, **where)

        p2p = SimpleNamespace(P2POp=operation, isend="isend", irecv="irecv", batch_isend_irecv=self._passed)
        return [
            patch.object(ring, "dist", p2p),
            patch.object(context, "dist", SimpleNamespace(all_to_all_single=self._all_to_all)),
        ]

    def on_ranks(self, job: Callable[[int], Any]) -> list[Any]:
        """Run the job on every rank at once; return what each returns."""

        def run(rank: int) -> Any:
            self._here.rank = rank
            return job(rank)

        first, second = self.installed()
        with first, second, ThreadPoolExecutor(len(self.log)) as threads:
            return [future.result() for future in [threads.submit(run, rank) for rank in range(len(self.log))]]


def network(ranks: int) -> Network:
    """Return a network of so many ranks."""
    return Network([[] for _ in range(ranks)])


def context_axes(rank: int, ranks: int, heads: int) -> ContextAxes:
    """Return the axes of a rank: `heads` neighbours exchange heads, those at equal places form a ring."""
    rings = ranks // heads
    turn, place = divmod(rank, heads)

    def axis(name: str, group: tuple[int, ...]) -> Axis:
        return Axis(name, group, group.index(rank), len(group))  # type: ignore[arg-type]

    neighbours = tuple(turn * heads + other for other in range(heads))
    across = tuple(other * heads + place for other in range(rings))
    return ContextAxes(axis("cp", tuple(range(ranks))), axis("cp_heads", neighbours), axis("cp_ring", across))
