"""A pool of gloo ranks in spawned processes, reused by many small jobs: starting a rank costs seconds, a job does not.

    parent --pipe: (function, args, world)--> rank r < world: join a fresh group through a private file, call, leave

Functions go by name (they must be importable); results come back by rank. A generator function keeps what it has made
from one value to the next. Used by `verify`, by `bench` and by the parallel tests.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from dist_llm.errors import DistLLMError, PeerLostError
from dist_llm.runtime.lifeline import die_with_launcher
from dist_llm.runtime.process import backend_for, pin_loopback, stop_process


class RankFailure(Exception):
    """A job raised on a rank; holds the rank's traceback as text."""


@dataclass(frozen=True)
class _Reply:
    """What a rank answers: its job's value, or the traceback, and the error itself where a user can act on it."""

    value: Any = None
    trace: str | None = None
    error: DistLLMError | None = None
    more: bool = False
    """Whether the job is a generator that waits to be asked for its next value."""


class _HungUp(BaseException):
    """The parent closed its end of the pipe between two values of a generator."""


Prepare = Callable[[int], torch.device]
"""What a rank's process does before its first job, given its rank; returns the device that it computes on."""


def one_thread(rank: int) -> torch.device:
    """Compute on the CPU with one thread."""
    torch.set_num_threads(1)
    return torch.device("cpu")


def _serve(connection: Connection, rank: int, folder: str, timeout_seconds: float, prepare: Prepare) -> None:
    """Run jobs until the parent hangs up. Issues one rendezvous and one barrier a job."""
    die_with_launcher()
    # What a library prints is no part of the command's answer.
    os.dup2(2, 1)
    # Ctrl-C reaches the whole terminal; the parent ends its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pin_loopback()
    backend: str | None = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        # Modules are alive from here on: what the end of the job collects is the job's own, in a tenth of the time.
        gc.freeze()
        number, function, args, world = job
        try:
            backend = backend or backend_for(prepare(rank))
            store = FileStore(str(Path(folder) / f"job-{number}"), world)
            limit = timedelta(seconds=timeout_seconds)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
            # A job may be over before another rank has met this one, which would see a closed connection.
            dist.barrier()
            reply = _Reply(_finish(function(*args), connection))
        except _HungUp:
            stop_process()
            return
        except Exception as error:
            reply = _Reply(trace=traceback.format_exc(), error=error if isinstance(error, DistLLMError) else None)
            # Its frames hold the job's groups; they do not cross the pipe.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        # What the job made holds its groups in cycles, and each group has threads that poll until it is freed.
        stop_process()
        connection.send(reply)
        del job, function, args, reply


def _finish(value: Any, connection: Connection) -> Any:
    """Return what a job gave; of a generator send each value, and go on when the parent says so."""
    if not isinstance(value, Generator):
        return value
    for each in value:
        connection.send(_Reply(each, more=True))
        try:
            connection.recv()
        except EOFError:
            value.close()
            raise _HungUp from None
    return None


def _failures(replies: Mapping[int, _Reply]) -> str:
    """Return the tracebacks of the two lowest ranks that raised, each under its rank; "" when none did."""
    failed = [(rank, reply.trace) for rank, reply in sorted(replies.items()) if reply.trace is not None]
    return "\n".join(f"rank {rank}: {trace}" for rank, trace in failed[:2])


class WorkerPool:
    """`size` ranks waiting for jobs; a context manager that ends them.

    prepare: importable, what each process does first; where it fails, the first job does.
    """

    def __init__(self, size: int, timeout_seconds: float = 120.0, prepare: Prepare = one_thread) -> None:
        self.size = size
        self._timeout = timeout_seconds
        self._prepare = prepare
        self._folder = tempfile.TemporaryDirectory(prefix="dist_llm-pool-")
        self._jobs = 0
        self._ranks: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (theirs, rank, self._folder.name, self._timeout, self._prepare)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any, world: int) -> list[Any]:
        """Call an importable function with args on ranks 0..world-1 of a fresh group; return the results by rank.

        An error that a user can act on is raised as it was, any other as RankFailure with the traceback of the lowest
        rank that raised; PeerLostError when a rank died, or gave no answer long after another had failed (the pool is
        then started anew by the next call).
        """
        chosen, job = self._begin(function, args, world)
        return [reply.value for reply in self._exchange(chosen, job)]

    def stream(self, function: Callable[..., Any], *args: Any, world: int) -> Iterator[list[Any]]:
        """Call an importable generator function as `run` does; each step of this iterator is one of it on every rank.

        Between two values the ranks wait without computing. Nothing else can run on the pool until the end; an iterator
        that is dropped before ends the ranks. Errors as those of `run`.
        """
        chosen, message = self._begin(function, args, world)
        ended = False
        try:
            while (replies := self._exchange(chosen, message))[0].more:
                if not all(reply.more for reply in replies):
                    raise RankFailure("a generator has ended on some ranks and not on rank 0")
                yield [reply.value for reply in replies]
                message = None
            ended = True
        finally:
            if not ended:
                self._stop()

    def _begin(self, function: Callable[..., Any], args: tuple[Any, ...], world: int) -> tuple[list[Connection], Any]:
        """Start the ranks if there are none; return the connections of those that a job takes, and its message."""
        if world > self.size:
            raise ValueError(f"a pool of {self.size} ranks cannot run a job of {world}")
        if not self._ranks:
            self._start()
        self._jobs += 1
        return [connection for _, connection in self._ranks[:world]], (self._jobs, function, args, world)

    def _exchange(self, chosen: list[Connection], message: Any) -> list[_Reply]:
        """Send a message to ranks and return their replies; raise what `run` does."""
        try:
            for connection in chosen:
                connection.send(message)
            replies = self._receive({connection: rank for rank, connection in enumerate(chosen)})
        except (PeerLostError, OSError):
            self._stop()
            raise
        errors = [reply.error for reply in replies if reply.error is not None]
        if errors:
            raise errors[0]
        if failures := _failures(dict(enumerate(replies))):
            raise RankFailure(failures)
        return replies

    def _receive(self, waiting: dict[Connection, int]) -> list[_Reply]:
        """Return the replies by rank. A job may take as long as it needs; a failed one only a group's timeout more."""
        replies: dict[int, _Reply] = {}
        deadline = math.inf
        while waiting:
            ready = wait(list(waiting), timeout=1.0)
            for connection in [each for each in waiting if each in ready]:
                rank = waiting.pop(connection)
                try:
                    replies[rank] = connection.recv()
                except EOFError:
                    raise PeerLostError(f"rank {rank} of the pool died") from None
                if replies[rank].trace is not None:
                    deadline = min(deadline, time.monotonic() + 2 * self._timeout)
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"ranks {sorted(waiting.values())} of the pool hang after another failed\n{_failures(replies)}"
                )
        return [replies[rank] for rank in sorted(replies)]

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
