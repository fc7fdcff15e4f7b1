"""A rank ends with its launcher, also when the launcher was gone before the rank could ask for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_llm.runtime.lifeline import LAUNCHER_PID_VARIABLE

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a parent-death signal is a Linux feature")

_LAUNCHER = """
import os, subprocess, sys, time
os.environ[sys.argv[1]] = str(os.getpid())
rank = subprocess.Popen([*sys.argv[2:]])
print(rank.pid, flush=True)
time.sleep(60)
"""
_RANK = "import time; print('rank', flush=True); time.sleep(60)"


def _alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until_gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not _alive(pid)


def _start(words: list[str]) -> tuple[subprocess.Popen[str], int]:
    """Start a launcher of one rank; return it and the rank's process id once both run."""
    command = [sys.executable, "-c", _LAUNCHER, LAUNCHER_PID_VARIABLE, *words]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "rank\n"
    return launcher, rank


def _kill(launcher: subprocess.Popen[str]) -> None:
    launcher.kill()
    launcher.wait()
    assert launcher.stdout is not None
    launcher.stdout.close()


def test_a_rank_dies_with_its_killed_launcher() -> None:
    launcher, rank = _start([sys.executable, "-m", "dist_llm.runtime.lifeline", sys.executable, "-c", _RANK])
    _kill(launcher)
    assert _wait_until_gone(rank, 5.0)


def test_without_the_lifeline_it_would_not() -> None:
    launcher, rank = _start([sys.executable, "-c", _RANK])
    _kill(launcher)
    try:
        assert not _wait_until_gone(rank, 0.5)
    finally:
        os.kill(rank, signal.SIGKILL)


def test_a_launcher_that_is_already_gone() -> None:
    # The parent named is not the parent there is: the launcher died before the rank asked for the signal.
    env = {**os.environ, LAUNCHER_PID_VARIABLE: "999999999"}
    words = [sys.executable, "-m", "dist_llm.runtime.lifeline", sys.executable, "-c", "print('ran')"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == ""


def test_a_rank_passes_its_launcher_on_to_nobody() -> None:
    show = f"import os; print({LAUNCHER_PID_VARIABLE!r} in os.environ)"
    env = {**os.environ, LAUNCHER_PID_VARIABLE: str(os.getpid())}
    words = [sys.executable, "-m", "dist_llm.runtime.lifeline", sys.executable, "-c", show]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
