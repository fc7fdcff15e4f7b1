"""A save happens wholly or not at all, whatever stops it, and what was committed before it stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.checkpoint import save as save_module
from dist_llm.checkpoint.inspect import describe, verify
from dist_llm.checkpoint.load import find_latest, load
from dist_llm.checkpoint.retention import prune
from dist_llm.checkpoint.save import save
from dist_llm.checkpoint.storage import ensure_writable
from dist_llm.errors import CheckpointError, DistLLMError, ExitCode, StorageError
from dist_llm.types import TrainState
from tests.unit.checkpoint.synthetic import blank, full_tensors, same_bits, save_on_ranks, small_state, split

REPOSITORY = Path(__file__).parents[3]
CALLS = ("open", "write", "fsync", "rename", "mkdir", "scandir")


def names(root: Path) -> list[str]:
    """Return what stands in a directory."""
    return sorted(entry.name for entry in root.iterdir())


def holds(path: Path, state: TrainState) -> bool:
    """Does a checkpoint hold this state?"""
    wanted = blank([state])[0]
    return load(path, wanted) == state.facts and same_bits([wanted], [state])


def damage(path: Path) -> None:
    """Flip the last bit of the first rank's file."""
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("scenario", ["save", "save over damage", "prune"])
def test_a_kill_at_any_call_leaves_the_newest_complete_checkpoint(tmp_path: Path, scenario: str) -> None:
    command = [sys.executable, "-m", "tests.unit.checkpoint.crash_worker", str(tmp_path), scenario]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["wrong"] == []
    assert told["points"] >= 10
    assert told["torn writes"] >= (0 if scenario == "prune" else 3)
    assert set(told["latest"]) == ({"3"} if scenario == "prune" else {"1", "2"})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_failing_call_on_any_rank_fails_all_and_leaves_nothing(
    root: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small_state(1.0)
    save(root, 1, before)
    states = split({"w": full_tensors()["matrix.float32"]}, "zero3", {"step": 2})
    unnoticed: list[str] = []
    for call in CALLS:
        for point in range(100):
            remaining = [point]
            really = getattr(os, call)

            def fail(*arguments: object, really=really, remaining=remaining, **options: object) -> object:
                remaining[0] -= 1
                if remaining[0] == -1:
                    raise OSError(code, os.strerror(code))
                return really(*arguments, **options)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, fail)
                outcomes = save_on_ranks(root, 2, states)
            if remaining[0] >= 0:
                break
            assert len({str(outcome) for outcome in outcomes}) == 1
            # Two may fail unnoticed: making a root that is there, reading the digest of the checkpoint before.
            if isinstance(outcomes[0], Path):
                unnoticed.append(call)
            else:
                assert isinstance(outcomes[0], StorageError), outcomes[0]
                assert os.strerror(code) in str(outcomes[0])
                assert outcomes[0].exit_code == ExitCode.IO
            assert set(names(root)) <= {"step-00000001", "step-00000002"}
            assert holds(root / "step-00000001", before)
            if (root / "step-00000002").exists():
                # After the rename comes only the sync of the parent directory.
                assert isinstance(outcomes[0], Path) or call in {"fsync", "open"}
                assert verify(root / "step-00000002") == []
                shutil.rmtree(root / "step-00000002")
        assert point >= 1, f"{call} was never called"
        assert verify(root / "step-00000002") == []
        shutil.rmtree(root / "step-00000002")
    assert set(unnoticed) <= {"mkdir", "open", "scandir"}
    assert len(unnoticed) <= 4


def test_a_full_disk_is_an_io_error_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    worker = [sys.executable, "-m", "tests.unit.checkpoint.full_disk", str(tmp_path)]
    alone = ["unshare", "--mount"]  # the small file system goes with the process
    may_mount = subprocess.run(
        [*alone, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    command = [*alone, *worker, "tmpfs"] if may_mount.returncode == 0 else [*worker, "limit"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["error"].startswith("StorageError: cannot write ")
    assert told["error"].endswith(("No space left on device", "File too large"))
    assert told["names"] == ["step-00000001"]
    assert told["verify"] == []


def test_leftovers_of_a_dead_run_are_removed_and_nothing_else(root: Path) -> None:
    root.mkdir()
    leftover = root / "step-00000001.tmp-0123456789abcdef0123456789abcdef"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    (root / "step-00000001.tmp-mine").mkdir()
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "kept").write_bytes(b"")
    link = root / "step-00000002.tmp-0123456789abcdef0123456789abcdef"
    link.symlink_to(root / "elsewhere")
    save(root, 1, small_state(1.0))
    assert names(root) == ["elsewhere", "step-00000001", "step-00000001.tmp-mine", link.name]
    assert names(root / "elsewhere") == ["kept"]


def test_saving_the_same_state_again_writes_nothing(root: Path) -> None:
    tensors = full_tensors()
    path = save(root, 1, split(tensors, "one", {"step": 1})[0])

    def stamps() -> dict[str, tuple[int, int, int]]:
        found = {file.name: file.stat() for file in [path, *path.iterdir()]}
        return {name: (status.st_ino, status.st_mtime_ns, status.st_ctime_ns) for name, status in found.items()}

    before = stamps()
    for layout in ("one", "tp2_dp2"):
        states = split(tensors, layout, {"step": 1})
        assert save_on_ranks(root, 1, states) == [path] * len(states)
    assert stamps() == before
    assert names(root) == ["step-00000001"]


def test_another_state_never_overwrites(root: Path) -> None:
    tensors = full_tensors()
    path = save(root, 1, split(tensors, "one")[0])
    digest = describe(path)["manifest_sha256"]
    changed = {**tensors, "vector.int64": tensors["vector.int64"] + 1}
    fewer = {name: tensor for name, tensor in tensors.items() if name != "scalar.bool"} | {"new": tensors["bits"]}
    for states, told in [
        (split(changed, "tp2_dp2"), "vector.int64"),
        (split(fewer, "tp2_dp2"), "new"),
        (split(tensors, "one", {"step": 2}), "facts"),
    ]:
        for outcome in save_on_ranks(root, 1, states):
            assert isinstance(outcome, CheckpointError)
            assert told in str(outcome)
            assert "never overwritten" in str(outcome)
    assert describe(path)["manifest_sha256"] == digest
    assert names(root) == ["step-00000001"]


def test_a_damaged_one_is_put_aside_for_the_new(root: Path) -> None:
    damage(save(root, 1, small_state(1.0)))
    assert holds(save(root, 1, small_state(2.0)), small_state(2.0))
    assert [name.split("damaged-")[0] for name in names(root)] == ["step-00000001", "step-00000001."]
    assert find_latest(root) == root / "step-00000001"


def test_all_is_durable_before_the_rename_and_the_rename_after(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(fd: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name.split(".tmp-")[0]))
        fsync(fd)

    def seen_rename(source: Path, target: Path) -> None:
        done.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    save_on_ranks(root, 1, split(full_tensors(), "pp2_tp2"))
    assert done.pop(0) == ("sync", root.parent.name)
    assert sorted(done[:4]) == [("sync", f"rank-0000{rank}.safetensors") for rank in range(4)]
    assert done[4:7] == [("sync", "manifest.json"), ("sync", "manifest.sha256"), ("sync", "step-00000001")]
    assert done[7:] == [("rename", "step-00000001"), ("sync", "checkpoints")]


def test_a_file_that_rank_0_sees_shorter_is_not_committed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part = save_module.write_part

    def cut_short(staging: Path, rank: int, step: int, state: TrainState) -> save_module.Part:
        part = write_part(staging, rank, step, state)
        if rank == 1:
            os.truncate(staging / "rank-00001.safetensors", 100)
        return part

    monkeypatch.setattr(save_module, "write_part", cut_short)
    for outcome in save_on_ranks(root, 1, split(full_tensors(), "zero3")):
        assert isinstance(outcome, StorageError)
        assert "rank-00001.safetensors has 100 bytes where its rank wrote" in str(outcome)
    assert names(root) == []


@pytest.mark.parametrize("moment", ["sidecar_text", "publish"])
def test_two_runs_in_one_directory_never_mix(root: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    really = getattr(save_module, moment)

    def overtaken(*arguments: object) -> object:
        monkeypatch.setattr(save_module, moment, really)
        monkeypatch.setattr(save_module, "remove_leftovers", lambda root: None)
        save(root, 1, small_state(2.0))
        return really(*arguments)

    monkeypatch.setattr(save_module, moment, overtaken)
    with pytest.raises(CheckpointError, match="another process"):
        save(root, 1, small_state(1.0))
    assert holds(root / "step-00000001", small_state(2.0))
    assert names(root) == ["step-00000001"]


def test_a_bug_on_one_rank_reaches_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part = save_module.write_part

    def broken(staging: Path, rank: int, step: int, state: TrainState) -> save_module.Part:
        if rank == 1:
            raise ZeroDivisionError("oops")
        return write_part(staging, rank, step, state)

    monkeypatch.setattr(save_module, "write_part", broken)
    outcomes = save_on_ranks(root, 1, split(full_tensors(), "zero3"))
    assert all(type(outcome) is DistLLMError for outcome in outcomes)
    assert {str(outcome) for outcome in outcomes} == {"rank 1: ZeroDivisionError: oops"}
    assert names(root) == []


def test_pruning_keeps_the_newest(root: Path) -> None:
    for step in range(1, 6):
        save(root, step, small_state(float(step)))
    (root / "notes.txt").write_text("mine")
    assert prune(root, 2) == [root / "step-00000003", root / "step-00000002", root / "step-00000001"]
    assert names(root) == ["notes.txt", "step-00000004", "step-00000005"]
    assert prune(root, 2) == []
    with pytest.raises(ValueError, match="keep=0"):
        prune(root, 0)


@pytest.mark.parametrize("keep", [1, 2])
def test_pruning_never_deletes_the_only_sound_one(root: Path, keep: int) -> None:
    for step in range(1, 5):
        path = save(root, step, small_state(float(step)))
        if step > 1:
            damage(path)
    assert prune(root, keep) == []
    assert find_latest(root, report=lambda line: None) == root / "step-00000001"
    for step in (2, 3, 4):
        (root / f"step-{step:08d}" / "manifest.json").unlink()
    assert prune(root, keep) == []
    assert len(names(root)) == 4


def test_one_sound_checkpoint_among_those_kept_is_enough_to_prune(root: Path) -> None:
    for step in (1, 2, 3):
        save(root, step, small_state(float(step)))
    damage(root / "step-00000002")
    assert prune(root, 2) == [root / "step-00000001"]
    assert find_latest(root) == root / "step-00000003"


def test_pruning_leaves_links_alone(root: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", 1, small_state(1.0))
    for step in (2, 3):
        save(root, step, small_state(float(step)))
    (root / "step-00000001").symlink_to(other)
    assert prune(root, 1) == [root / "step-00000002"]
    assert verify(other) == []


def test_an_unwritable_place_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        ensure_writable(tmp_path / "file" / "checkpoints")
    ensure_writable(tmp_path / "new" / "checkpoints")
    assert names(tmp_path / "new" / "checkpoints") == []


def test_no_file_stays_open(root: Path) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for step in range(10):
        path = save(root, step, small_state(float(step)))
        load(path, blank([small_state(0.0)])[0])
        damage(path)
        with pytest.raises(CheckpointError):
            load(path, blank([small_state(0.0)])[0])
        assert verify(path)
    assert count() == before
