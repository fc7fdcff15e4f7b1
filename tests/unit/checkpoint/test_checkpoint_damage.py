"""No damaged byte is ever loaded: every trial ends in the right bits or in a refusal that names the file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_llm.checkpoint.inspect import verify
from dist_llm.checkpoint.load import find_latest, load
from dist_llm.checkpoint.manifest import sidecar_text
from dist_llm.checkpoint.save import save
from dist_llm.errors import CheckpointError, ExitCode, StorageError
from dist_llm.types import TrainState
from tests.unit.checkpoint.synthetic import blank, load_on_ranks, save_on_ranks, small_state, split

FLIPS_PER_FILE = 150


def saved(root: Path) -> tuple[Path, TrainState]:
    """Commit a state of four ranks, incompressible; return where, and the shards of one process that hold it whole."""
    generator = torch.Generator().manual_seed(1)
    tensors = {f"layer.{i}": torch.rand(12, 10, generator=generator) for i in range(3)}
    tensors |= {"twin.a": torch.rand(8, generator=generator), "twin.b": torch.rand(8, generator=generator)}
    path = save_on_ranks(root, 5, split(tensors, "tp2_dp2", {"position": 320}))[0]
    assert isinstance(path, Path)
    return path, split(tensors, "one")[0]


def refused(path: Path, state: TrainState) -> str:
    """Return the refusal of a load and check that `verify` and the search for the latest see the damage too."""
    with pytest.raises(CheckpointError) as failure:
        load(path, blank([state])[0])
    assert failure.value.exit_code == ExitCode.BAD_DATA
    assert verify(path)
    with pytest.raises(CheckpointError):
        find_latest(path.parent, report=lambda line: None)
    return str(failure.value)


def sign(path: Path, tree: dict) -> None:
    """Write a manifest as somebody would who may also write its digest."""
    text = json.dumps(tree).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_bytes(sidecar_text(text))


def test_every_flipped_bit_is_refused(root: Path) -> None:
    path, state = saved(root)
    load(path, blank([state])[0])
    choose = random.Random(0)
    trials = 0
    for file in sorted(path.iterdir()):
        sound = file.read_bytes()
        for bit in choose.sample(range(8 * len(sound)), min(FLIPS_PER_FILE, 8 * len(sound))):
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load(path, blank([state])[0])
            assert verify(path), f"{file.name} bit {bit}"
            trials += 1
        file.write_bytes(sound)
    assert trials == 6 * FLIPS_PER_FILE
    assert verify(path) == []


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "one byte short": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "zeros at the end": lambda content: content[:-16] + bytes(16),
    "longer": lambda content: content + b"\0",
    "doubled": lambda content: content * 2,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_cut_grown_or_zeroed_is_refused(root: Path, damage: str) -> None:
    path, state = saved(root)
    for file in sorted(path.iterdir()):
        sound = file.read_bytes()
        file.write_bytes(DAMAGES[damage](sound))
        assert file.name.split(".")[0] in refused(path, state)
        file.write_bytes(sound)
    assert verify(path) == []


def test_every_deleted_linked_or_special_file_is_refused(root: Path, tmp_path: Path) -> None:
    path, state = saved(root)
    aside = tmp_path / "aside"

    def link() -> None:
        file.symlink_to(aside)

    def pipe() -> None:
        os.mkfifo(file)

    def directory() -> None:
        file.mkdir()

    for file in sorted(path.iterdir()):
        file.rename(aside)
        assert file.name in refused(path, state)
        for replace in (link, pipe, directory):
            replace()
            refusal = refused(path, state)
            assert file.name in refusal
            assert replace is link or "is not a regular file" in refusal
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        aside.rename(file)
    assert verify(path) == []


def test_swapped_files_are_refused(root: Path) -> None:
    path, state = saved(root)
    one, other = path / "rank-00000.safetensors", path / "rank-00001.safetensors"
    other.rename(path / "aside")
    one.rename(other)
    (path / "aside").rename(one)
    assert "rank-00000" in refused(path, state)


def test_a_swap_with_matching_digests_is_refused_because_digests_bind_the_place(root: Path) -> None:
    path, state = saved(root)
    tree = json.loads((path / "manifest.json").read_bytes())
    first, second = (tree["tensors"][name]["chunks"] for name in ("twin.a", "twin.b"))
    for one, other in zip(first, second, strict=True):
        for key in ("file", "start", "sha256"):
            one[key], other[key] = other[key], one[key]
    sign(path, tree)
    assert "twin" in refused(path, state)


def test_bytes_of_another_step_are_refused_because_digests_bind_the_step(root: Path) -> None:
    path, state = saved(root)
    tree = json.loads((path / "manifest.json").read_bytes())
    sign(path, {**tree, "step": 6})
    assert "step 5" not in refused(path, state)
    path = path.rename(root / "step-00000006")
    assert "sha256" in refused(path, state)
    sign(path, tree)
    assert "holds step 5" in refused(path, state)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/b.safetensors", "..", "", "a\0b.safetensors", "x" * 4096, "é.safetensors"]
)
def test_names_that_lead_elsewhere_are_refused_unopened(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = saved(root)
    tree = json.loads((path / "manifest.json").read_bytes())
    tree["files"][0]["name"] = name
    sign(path, tree)
    opened: list[Path] = []
    really_open = os.open
    monkeypatch.setattr(os, "open", lambda file, *rest, **more: opened.append(Path(file)) or really_open(file, *rest))
    assert "files.0.name" in refused(path, state)
    assert {file.name for file in opened} == {"manifest.json", "manifest.sha256"}


def test_only_the_rank_that_needs_the_damage_finds_it_and_all_refuse(root: Path) -> None:
    path, state = saved(root)
    file = path / "rank-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 128
    file.write_bytes(content)
    tensors = {shard.name: shard.data for shard in state.tensors}
    outcomes = load_on_ranks(path, blank(split(tensors, "tp2_dp2")))
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert str(outcomes[0]).startswith("rank 2: ")
    assert "rank-00002.safetensors" in str(outcomes[0])


def test_the_search_falls_back_and_says_so(root: Path) -> None:
    for step in (1, 2, 3):
        save(root, step, small_state(float(step)))
    file = root / "step-00000003" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    (root / "step-00000002" / "manifest.sha256").unlink()
    (root / "step-00000009.tmp-0123456789abcdef0123456789abcdef").mkdir()
    (root / "step-00000008").symlink_to(root / "step-00000001")
    (root / "step-000000007").mkdir()
    said: list[str] = []
    assert find_latest(root, report=said.append) == root / "step-00000001"
    assert len(said) == 2
    assert "step-00000003/rank-00000.safetensors" in said[0]
    assert "step-00000002" in said[1]
    assert find_latest(root, verify="manifest", report=said.append) == root / "step-00000003"


def test_when_none_is_sound_the_run_does_not_start_over(root: Path) -> None:
    for step in (1, 2):
        path = save(root, step, small_state(float(step)))
        (path / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as failure:
        find_latest(root, report=lambda line: None)
    assert "step-00000001" in str(failure.value)
    assert "step-00000002" in str(failure.value)


def test_a_copy_is_loadable_when_complete(root: Path, tmp_path: Path) -> None:
    path, state = saved(root)
    copy = tmp_path / "warm start"
    shutil.copytree(path, copy)
    assert load(copy, blank([state])[0]) == {"position": 320}
    (copy / "rank-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rank-00003"):
        load(copy, blank([state])[0])


def test_what_the_system_refuses_is_not_called_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = saved(root)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied") as failure:
        load(path, blank([state])[0])
    assert failure.value.exit_code == ExitCode.IO
    with pytest.raises(StorageError):
        find_latest(root)
