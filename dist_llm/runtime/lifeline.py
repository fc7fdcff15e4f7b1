"""A rank dies with its launcher: no orphan keeps training into a run folder that a requeued job owns. No torch.

    launcher --fork--> python -m dist_llm.runtime.lifeline COMMAND ...: prctl(PR_SET_PDEATHSIG, SIGKILL);
                       is the launcher still my parent? --execve, which keeps the setting--> COMMAND ...

The kernel sends the signal when the parent thread ends, however it ends, SIGKILL included (prctl(2), Linux only).
A launcher that died before the prctl sends nothing, so the rank compares its parent with the process id that
`dist-llm launch` left in the environment and ends itself when they differ.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER_PID_VARIABLE = "DIST_LLM_LAUNCHER_PID"
"""Process id of the `dist-llm launch` that started this rank."""

_PR_SET_PDEATHSIG = 1


def die_with_launcher(launcher_pid: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends; end at once if the parent is no longer launcher_pid.

    None: whoever is the parent now. Until it ran the rank outlives its launcher, so it comes before torch is imported.
    """
    if sys.platform != "linux":
        return
    expected = os.getppid() if launcher_pid is None else launcher_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str]) -> None:
    """Become the command `argv` (a program's path and its arguments), tied to the launcher's life."""
    # Taken out of the environment: the rank's own children have another parent.
    named = os.environ.pop(LAUNCHER_PID_VARIABLE, "")
    die_with_launcher(int(named) if named.isdecimal() else None)
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
