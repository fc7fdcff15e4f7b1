"""The local launcher for real, with tiny ranks: exit codes, signals, orphans, sockets, and what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_llm.launcher.local import judge, launch_local
from dist_llm.runtime.agent import RankExit, RanksEnd

ROOT = Path(__file__).parents[3]

_WHOLE_LINES = """
import os as _os

def print(*words, **options):
    # One write a line: the ranks share a pipe, and an unbuffered print writes word by word.
    _os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""

_RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
{body}
"""
_LAUNCHER = """
import sys
from dist_llm.launcher.local import launch_local
if __name__ == "__main__":
    raise SystemExit(launch_local([sys.executable, sys.argv[1]], 2, shutdown_seconds=20.0))
"""
_UNTIL_TOLD = """
def save(*_):
    time.sleep(0.5)
    raise SystemExit(75)
signal.signal(signal.SIGTERM, {reaction})
os.write(1, f"rank {{os.getpid()}}\\n".encode())
time.sleep(60)
"""
_JOIN = """
import torch, torch.distributed as dist
from dist_llm.runtime.process import start_process, stop_process
from dist_llm.runtime.ranks import discover_ranks
start_process(discover_ranks(os.environ), "cpu", 60.0, 1)
value = torch.ones(1)
dist.all_reduce(value)
"""


@pytest.fixture(autouse=True)
def _package_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def rank_script(tmp_path: Path) -> Callable[[str], str]:
    def write(body: str) -> str:
        path = tmp_path / "rank.py"
        path.write_text(_WHOLE_LINES + _RANK.format(body=body))
        return str(path)

    return write


@pytest.fixture
def launcher(rank_script: Callable[[str], str], request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A launcher process of two ranks that run until they are told to stop."""
    script = rank_script(_UNTIL_TOLD.format(reaction=request.param))
    words = [sys.executable, "-W", "error", "-c", _LAUNCHER, script]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def _rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """Wait until both ranks run; return their process ids."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(2)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_done_when_all_ranks_are(rank_script: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    hostile = "a$b $$ ${local_rank} $(touch x)"
    script = rank_script("print(rank, os.environ['WORLD_SIZE'], sys.argv[1], flush=True)")
    assert launch_local([sys.executable, script, hostile], 2) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == [f"0 2 {hostile}", f"1 2 {hostile}"]
    assert captured.err == ""
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise SystemExit(78)", 78, "rank 0 of 2 ended with exit code 78 (configuration)"),
        ("time.sleep(0.3 * rank); raise SystemExit(69 - 4 * rank)", 65, "rank 1 of 2 ended with exit code 65"),
        ("os.kill(os.getpid(), 9) if rank else time.sleep(60)", 69, "rank 1 of 2 was killed by SIGKILL"),
        ("raise SystemExit(1)", 70, "rank 0 of 2 ended with exit code 1"),
    ],
    ids=["config", "cause-after-consequence", "killed", "uncaught"],
)
def test_the_code_is_that_of_the_rank_at_fault(
    rank_script: Callable[[str], str], capfd: pytest.CaptureFixture[str], body: str, code: int, line: str
) -> None:
    assert launch_local([sys.executable, rank_script(body)], 2) == code
    error = capfd.readouterr().err
    # One line and no table of the elastic agent.
    assert error.count("\n") == 1
    assert line in error


@pytest.mark.parametrize("launcher", ["save"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_lets_the_ranks_save(launcher: subprocess.Popen[str], number: signal.Signals) -> None:
    _rank_pids(launcher)
    launcher.send_signal(number)
    _, error = launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert error == (
        "dist-llm launch: rank 0 of 2 ended with exit code 75 (preempted, nothing lost; the same command goes on) "
        f"after {number.name}\n"
    )  # fmt: skip


@pytest.mark.parametrize("launcher", ["signal.SIG_IGN"], indirect=True)
def test_a_second_signal_kills_ranks_that_do_not_listen(launcher: subprocess.Popen[str]) -> None:
    pids = _rank_pids(launcher)
    begin = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=15)
    assert time.monotonic() - begin < 15
    assert launcher.returncode == 69
    assert not any(_alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="a parent-death signal is a Linux feature")
@pytest.mark.parametrize("launcher", ["signal.SIG_IGN"], indirect=True)
def test_no_orphans_when_the_launcher_is_killed(launcher: subprocess.Popen[str]) -> None:
    pids = _rank_pids(launcher)
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 5.0
    while any(_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are read from /proc")
def test_ranks_meet_and_only_loopback_listens(
    rank_script: Callable[[str], str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    listeners = """
from pathlib import Path
mine = {os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and os.path.exists(fd)}
for name in ("tcp", "tcp6"):
    for row in Path("/proc/net", name).read_text().splitlines()[1:]:
        local, state, inode = row.split()[1], row.split()[3], row.split()[9]
        if state == "0A" and f"socket:[{inode}]" in mine:
            os.write(1, f"listens {name} {local.split(':')[0]}\\n".encode())
dist.barrier()
mode = oct(Path(os.environ["DIST_LLM_STORE"]).parent.stat().st_mode & 0o777)
os.write(1, f"sum {value.item()} {mode}\\n".encode())  # one write a line: two ranks share this pipe
"""
    assert launch_local([sys.executable, rank_script(_JOIN + listeners)], 2) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines.count("sum 2.0 0o700") == 2
    found = {line for line in lines if line.startswith("listens")}
    # 0100007F is 127.0.0.1 as the kernel writes it.
    assert found == {"listens tcp 0100007F"}


def test_a_rank_that_leaves_its_group_open_keeps_its_code(
    rank_script: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    # gloo aborts a process that ends with an open group (-6); its peer must see 65 as the cause all the same.
    body = """
try:
    sys.exit(65) if rank else dist.barrier()
except RuntimeError:
    sys.exit(69)
"""
    script = rank_script(_JOIN + body)
    assert launch_local([sys.executable, script], 2) == 65
    assert "rank 1 of 2 ended with exit code 65" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("exits", "code"),
    [
        ([RankExit(0, 0, False), RankExit(1, 0, False)], 0),
        ([RankExit(0, 69, False), RankExit(1, 76, False)], 76),
        ([RankExit(0, 69, False), RankExit(1, -11, False)], 69),
        ([RankExit(0, 0, False), RankExit(1, 69, False)], 69),
        ([RankExit(0, 75, False), RankExit(1, -15, True)], 75),
        ([RankExit(0, 75, False), RankExit(1, 74, False)], 74),
        ([RankExit(0, -9, True), RankExit(1, 69, False)], 69),
        ([RankExit(0, -9, True), RankExit(1, -9, True)], 69),
        ([RankExit(0, -9, True), RankExit(1, 3, False)], 3),
    ],
)
def test_causes_come_before_consequences(exits: list[RankExit], code: int) -> None:
    assert judge(RanksEnd(tuple(exits), None))[0] == code


@pytest.mark.parametrize(
    ("exits", "stopped_by", "code"),
    [
        ([], signal.SIGTERM, 75),
        ([], signal.SIGINT, 130),
        ([RankExit(0, -15, True), RankExit(1, -15, True)], signal.SIGTERM, 75),
        ([RankExit(0, -15, True), RankExit(1, -15, True)], signal.SIGINT, 130),
        ([RankExit(0, -15, True), RankExit(1, 75, False)], signal.SIGTERM, 75),
        ([RankExit(0, 75, False), RankExit(1, 75, False)], signal.SIGINT, 75),
        ([RankExit(0, -9, True), RankExit(1, -15, True)], signal.SIGTERM, 69),
        ([RankExit(0, 69, False), RankExit(1, -15, True)], signal.SIGINT, 130),
        ([RankExit(0, 0, False), RankExit(1, 0, False)], signal.SIGTERM, 0),
    ],
)
def test_who_was_told_to_stop_is_not_at_fault(exits: list[RankExit], stopped_by: signal.Signals, code: int) -> None:
    assert judge(RanksEnd(tuple(exits), stopped_by))[0] == code


def test_the_private_folder_is_removed(rank_script: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local([sys.executable, rank_script("print(os.environ['DIST_LLM_STORE'], flush=True)")], 1) == 0
    store = Path(capfd.readouterr().out.strip())
    assert store.name == "store"
    assert not store.parent.exists()
    assert "DIST_LLM_STORE" not in os.environ
