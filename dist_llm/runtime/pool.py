"""A pool of gloo ranks in spawned processes, reused by many small jobs: starting a rank costs seconds, a job does not.

    parent --pipe: (function, args, world)--> rank r < world: join a fresh group through a private file, call, leave

Functions go by name (they must be importable); results come back by rank. Used by `verify` and by the parallel tests.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from dist_llm.errors import PeerLostError
from dist_llm.runtime.lifeline import die_with_launcher
from dist_llm.runtime.process import pin_loopback


class RankFailure(Exception):
    """A job raised on a rank; holds the rank's traceback as text."""


def _serve(connection: Connection, rank: int, folder: str, timeout_seconds: float) -> None:
    """Run jobs until the parent hangs up. Issues one rendezvous a job."""
    die_with_launcher()
    pin_loopback()
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        number, function, args, world = job
        try:
            store = FileStore(str(Path(folder) / f"job-{number}"), world)
            limit = timedelta(seconds=timeout_seconds)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
            reply = (True, function(*args))
        except Exception:
            reply = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(reply)


class WorkerPool:
    """`size` ranks waiting for jobs; a context manager that ends them."""

    def __init__(self, size: int, timeout_seconds: float = 120.0) -> None:
        self.size = size
        self._timeout = timeout_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="dist_llm-pool-")
        self._jobs = 0
        self._ranks: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (theirs, rank, self._folder.name, self._timeout)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any, world: int) -> list[Any]:
        """Call an importable function with args on ranks 0..world-1 of a fresh group; return the results by rank.

        RankFailure with the traceback of the lowest rank that raised; PeerLostError when a rank died or hung (the pool
        is then started anew by the next call).
        """
        if world > self.size:
            raise ValueError(f"a pool of {self.size} ranks cannot run a job of {world}")
        if not self._ranks:
            self._start()
        self._jobs += 1
        chosen = self._ranks[:world]
        try:
            for _, connection in chosen:
                connection.send((self._jobs, function, args, world))
            replies = [self._receive(rank, connection) for rank, (_, connection) in enumerate(chosen)]
        except (PeerLostError, OSError):
            self._stop()
            raise
        failures = [(rank, text) for rank, (ok, text) in enumerate(replies) if not ok]
        if failures:
            raise RankFailure("\n".join(f"rank {rank}: {text}" for rank, text in failures[:2]))
        return [value for _, value in replies]

    def _receive(self, rank: int, connection: Connection) -> tuple[bool, Any]:
        deadline = time.monotonic() + 3 * self._timeout
        while time.monotonic() < deadline:
            if connection.poll(1.0):
                try:
                    reply: tuple[bool, Any] = connection.recv()
                    return reply
                except EOFError:
                    break
            if not self._ranks[rank][0].is_alive() and not connection.poll(0):
                break
        raise PeerLostError(f"rank {rank} of the pool died or hung")

    def _stop(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._ranks = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._folder.cleanup()
