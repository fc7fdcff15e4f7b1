"""The ranks of one node under torchrun's elastic agent: started, watched and stopped together, exit codes kept.

    launcher --signal--> agent --SIGTERM--> every rank -> saves -> exit code -> RankExit
    a rank failed: the others see it gone and end by themselves; whoever does not gets SIGTERM, then SIGKILL

torchrun itself would listen on every interface, give 30 s to a preempted rank and forget its exit code; so the agent
is given a rendezvous that opens no port (the ranks meet in a FileStore in a private folder) and its own shutdown.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch._C._distributed_c10d import HashStore  # torch.distributed does not export it
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from dist_llm.errors import ExitCode
from dist_llm.runtime import lifeline
from dist_llm.runtime.process import STORE_VARIABLE
from dist_llm.runtime.variables import lend_variables

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_NOTICE_SECONDS = 4.0
_FAILURE_GRACE_SECONDS = 5


@dataclass(frozen=True)
class RankExit:
    """How a rank ended: its exit code, or minus the signal that killed it; forced if the launcher stopped it."""

    rank: int
    code: int
    forced: bool


@dataclass(frozen=True)
class RanksEnd:
    """How all ranks of the node ended, and the signal that the launcher was told to stop by, if any."""

    exits: tuple[RankExit, ...]
    stopped_by: signal.Signals | None


def run_ranks(argv: Sequence[str], nproc: int, shutdown_seconds: float, debug: bool = False) -> RanksEnd:
    """Run the command `argv` as `nproc` ranks of one node until all have ended.

    A termination signal of this process reaches every rank as SIGTERM, and the rank then has shutdown_seconds to save;
    a second one kills the ranks. Must be called in the main thread, which the ranks die with.
    """
    _set_log_level(logging.INFO if debug else logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="dist-llm-", ignore_cleanup_errors=True) as folder:
        store = Path(folder) / "store"
        variables = {
            STORE_VARIABLE: str(store),
            lifeline.LAUNCHER_PID_VARIABLE: str(os.getpid()),
            "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(_SIGNALS),
        }
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            rdzv_handler=_OneNode(run_id=Path(folder).name),
            entrypoint=sys.executable,
            # The agent substitutes ${local_rank} in arguments; ours are not templates.
            args=("-m", lifeline.__name__, *(argument.replace("$", "$$") for argument in argv)),
            max_restarts=0,
        )
        agent = _Agent(spec, DefaultLogsSpecs(log_dir=folder), shutdown_seconds)
        with lend_variables(variables), _signal_handlers_kept():
            try:
                agent.run()
            except SignalException as stop:
                return RanksEnd(agent.exits(), stop.sigval)
            return RanksEnd(agent.exits(), None)


class _OneNode(RendezvousHandler):
    """The rendezvous of a job that has one node: nothing to wait for, no socket, rank 0 of 1."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store = HashStore()

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def get_backend(self) -> str:
        return "one-node"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return None

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class _Agent(LocalElasticAgent):
    """The elastic agent, told how long ranks may take to stop, and remembering how each of them ended."""

    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, shutdown_seconds: float) -> None:
        super().__init__(spec, logs_specs)
        self._shutdown_seconds = max(1, round(shutdown_seconds))
        self._forced: frozenset[int] = frozenset()

    def exits(self) -> tuple[RankExit, ...]:
        """Return how each rank ended, by rank; one that could not be reaped counts as killed."""
        return tuple(
            RankExit(rank, -signal.SIGKILL if code is None else code, rank in self._forced)
            for rank, code in sorted(self._codes().items())
        )

    def _codes(self) -> dict[int, int | None]:
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        return {rank: handler.proc.poll() for rank, handler in self._pcontext.subprocess_handlers.items()}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if any(self._codes().values()):
            self._let_others_end()
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _let_others_end(self) -> None:
        """After a first failure let every rank come to its own exit code: the first one seen is not always the cause.

        Preempted ranks leave one by one, each after its last write, and may take as long as a shutdown may.
        """
        failed = {code for code in self._codes().values() if code}
        patience = self._shutdown_seconds if failed == {int(ExitCode.PREEMPTED)} else _NOTICE_SECONDS
        end = time.monotonic() + patience
        while None in self._codes().values() and time.monotonic() < end:
            time.sleep(0.05)
        self._force(signal.SIGTERM, _FAILURE_GRACE_SECONDS)

    def _force(self, death_sig: signal.Signals, seconds: int) -> None:
        """Signal the ranks that still run, then kill those that outlast `seconds`."""
        self._forced |= {rank for rank, code in self._codes().items() if code is None}
        if self._pcontext is not None:
            self._pcontext.close(death_sig, seconds)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        """Stop the ranks in our own time: torch before 2.12 passes none."""
        try:
            self._force(signal.SIGTERM, self._shutdown_seconds)
        except SignalException:
            self._force(signal.SIGKILL, _FAILURE_GRACE_SECONDS)
            raise
        super()._shutdown(death_sig)


def _set_log_level(level: int) -> None:
    """Set the level of the elastic agent's loggers; each carries its own, so that of their parent says nothing."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(level)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Put the signal handlers of this process back: the agent installs its own and leaves them."""
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in _SIGNALS)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
