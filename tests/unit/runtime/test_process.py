"""One rank's start: threads, loopback, store; and which errors mean that a peer is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_llm.errors import LayoutError, PeerLostError, StorageError
from dist_llm.runtime.cores import usable_cores
from dist_llm.runtime.process import STORE_VARIABLE, is_peer_loss, start_process
from dist_llm.runtime.ranks import RankInfo

ROOT = Path(__file__).parents[3]

_ALONE = """
import json, os, sys
import torch, torch.distributed as dist
from dist_llm.runtime.process import start_process, stop_process
from dist_llm.runtime.ranks import RankInfo
threads = json.loads(sys.argv[1])
device = start_process(RankInfo(0, 1, 0, 1), "cpu", 60.0, threads)
value = torch.full((2,), 3.0)
dist.all_reduce(value)
facts = {
    "device": device.type, "sum": value.tolist(), "world": dist.get_world_size(), "backend": dist.get_backend(),
    "threads": torch.get_num_threads(), "interop": torch.get_num_interop_threads(),
    "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
}
stop_process()
print(json.dumps({**facts, "left": not dist.is_initialized()}))
"""


def _alone(threads: int | None, env: dict[str, str]) -> dict[str, object]:
    words = [sys.executable, "-W", "error", "-c", _ALONE, json.dumps(threads)]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts: dict[str, object] = json.loads(done.stdout)
    return facts


def test_alone_is_a_group_of_one_with_the_configured_threads() -> None:
    # OMP_NUM_THREADS is what torchrun sets and a shell does not: numbers must not depend on it.
    facts = _alone(threads=3, env={"OMP_NUM_THREADS": "1"})
    interface = facts.pop("interface")
    assert interface in ("lo", "lo0")
    assert facts == {
        "device": "cpu", "sum": [3.0, 3.0], "world": 1, "backend": "gloo", "threads": 3, "interop": 1, "left": True
    }  # fmt: skip


def test_unset_threads_are_the_cores() -> None:
    assert _alone(threads=None, env={"OMP_NUM_THREADS": "7"})["threads"] == usable_cores()


@pytest.mark.skipif(sys.platform != "linux", reason="core binding is read on Linux only")
def test_cores_do_not_depend_on_the_binding() -> None:
    before, cores = os.sched_getaffinity(0), usable_cores()
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == cores
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)


def test_several_ranks_need_a_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (STORE_VARIABLE, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LayoutError, match="MASTER_ADDR=unset"):
        _start_second_of_two()


def test_a_store_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o770)
    monkeypatch.setenv(STORE_VARIABLE, str(folder / "store"))
    with pytest.raises(StorageError, match="closed to others"):
        _start_second_of_two()


def test_a_store_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "gone" / "store"))
    with pytest.raises(StorageError, match="is its launcher still running"):
        _start_second_of_two()


def test_peers_that_do_not_come_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "store"))
    with pytest.raises(PeerLostError, match=r"rank 1 of 2 met not all of its peers within 1 s"):
        _start_second_of_two()
    assert not dist.is_initialized()


def _start_second_of_two() -> None:
    """Start rank 1 of 2 in this process, as far as it gets, without what would outlast the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_llm.runtime.process.die_with_launcher", lambda: None)
        patch.setattr("dist_llm.runtime.process._set_threads", lambda threads: None)
        patch.setattr("dist_llm.runtime.process._keep_freed_memory", lambda: None)
        patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        patch.delenv("NCCL_SOCKET_IFNAME", raising=False)
        start_process(RankInfo(1, 2, 1, 2), "cpu", 1.0, 1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:24807. This is typically caused by ..."),
        RuntimeError("[pair.cc:537] Read error [127.0.0.1]:58058: Connection reset by peer."),
        RuntimeError("[unbound_buffer.cc:81] Timed out waiting 8000ms for recv operation to complete"),
        RuntimeError("[pair.cc:169] writev [127.0.0.1]:4711: Broken pipe"),
        ConnectionResetError(104, "Connection reset by peer"),
        PeerLostError("rank 3 is gone"),
        dist.DistNetworkError("The client socket has failed to connect"),
        dist.DistStoreError("Wait timeout after 1000ms"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:24]}",
)
def test_peer_loss_is_seen(error: BaseException) -> None:
    assert is_peer_loss(error)


def test_peer_loss_is_seen_through_its_consequence() -> None:
    def fail() -> None:
        try:
            raise RuntimeError("Connection closed by peer")
        except RuntimeError as error:
            raise ValueError("could not sum") from error

    with pytest.raises(ValueError, match="could not sum") as caught:
        fail()
    assert is_peer_loss(caught.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("timed out waiting"), OSError(28, "x")],
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_peer_loss(error)
