"""`launcher=local`: the ranks of this machine, under torchrun's elastic agent, started, stopped and accounted for.

The exit code is that of the rank whose failure came first in cause, not in time: a rank with bad data (65) takes its
peers down with 69, and some of those may be seen before it. A rank killed by a signal is a lost peer (69: retry).
torch is imported when ranks are started and not before.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_llm.errors import INTERRUPTED, ExitCode

if TYPE_CHECKING:
    from dist_llm.runtime.agent import RankExit, RanksEnd

SHUTDOWN_SECONDS = 120.0
"""How long ranks may take to save after a termination signal; a scheduler's own limit is usually shorter."""

_MEANINGS = {
    ExitCode.BAD_DATA: "data or checkpoint damaged",
    ExitCode.PEER_LOST: "a peer or the store was lost; retry",
    ExitCode.BUG: "an internal error",
    ExitCode.IO: "input or output failed",
    ExitCode.PREEMPTED: "preempted, nothing lost; the same command goes on",
    ExitCode.NUMERICS: "numerics",
    ExitCode.CONFIG: "configuration",
}


def launch_local(
    argv: Sequence[str], nproc: int, shutdown_seconds: float = SHUTDOWN_SECONDS, debug: bool = False
) -> int:
    """Run the command `argv` as `nproc` ranks of this machine; return 0, or the exit code of the rank at fault.

    SIGTERM and SIGINT are passed on, and the ranks then have shutdown_seconds to save; a second one kills them. They
    die with this process however it ends. Says on stderr in one line which rank ended the job. Call in the main thread.
    """
    from dist_llm.runtime.agent import run_ranks

    end = run_ranks(argv, nproc, shutdown_seconds, debug)
    code, line = judge(end)
    if line:
        # A full disk behind stderr must not hide how the job ended.
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)
    return code


def judge(end: RanksEnd) -> tuple[int, str]:
    """Return the exit code of the whole launch and the line that explains it (empty when all ranks are done)."""
    failed = [exit_ for exit_ in end.exits if exit_.code != 0]
    if end.stopped_by is not None and all(exit_.forced and exit_.code == -signal.SIGTERM for exit_ in end.exits):
        code = INTERRUPTED if end.stopped_by is signal.SIGINT else int(ExitCode.PREEMPTED)
        return code, f"dist-llm launch: {end.stopped_by.name} before the ranks had begun"
    if not failed:
        return int(ExitCode.DONE), ""
    cause = min(failed, key=lambda exit_: (_precedence(exit_), exit_.rank))
    if end.stopped_by is signal.SIGINT and _exit_code(cause) == ExitCode.PEER_LOST:
        return INTERRUPTED, "dist-llm launch: interrupted"
    told = f" after {end.stopped_by.name}" if end.stopped_by is not None else ""
    line = f"dist-llm launch: rank {cause.rank} of {len(end.exits)} {_account(cause)}{told}"
    return _exit_code(cause), line


def _precedence(exit_: RankExit) -> int:
    """Order causes before consequences: own failure, killed from outside, lost peer, preempted, killed by us."""
    if exit_.code < 0:
        return 4 if exit_.forced else 1
    return {int(ExitCode.PEER_LOST): 2, int(ExitCode.PREEMPTED): 3}.get(exit_.code, 0)


def _exit_code(exit_: RankExit) -> int:
    """Return the code of the launch: that of the rank; 69 for a signal; 70 for the 1 of an error that nobody caught."""
    if exit_.code < 0:
        return int(ExitCode.PEER_LOST)
    return int(ExitCode.BUG) if exit_.code == 1 else exit_.code


def _account(exit_: RankExit) -> str:
    """Say how a rank ended."""
    if exit_.code < 0:
        names = {member.value: member.name for member in signal.Signals}
        killer = names.get(-exit_.code, f"signal {-exit_.code}")
        by = "was stopped with" if exit_.forced else "was killed by"
        return f"{by} {killer} (exit code {int(ExitCode.PEER_LOST)}: {_MEANINGS[ExitCode.PEER_LOST]})"
    meaning = f" ({_MEANINGS[ExitCode(exit_.code)]})" if exit_.code in _MEANINGS else ""
    return f"ended with exit code {exit_.code}{meaning}"
