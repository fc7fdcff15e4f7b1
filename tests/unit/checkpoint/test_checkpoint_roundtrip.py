"""What is saved in one layout comes back, bit for bit, in any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dist_llm.checkpoint import load as load_module
from dist_llm.checkpoint.cover import IncompleteStateError
from dist_llm.checkpoint.inspect import describe, list_checkpoints, read_manifest, verify
from dist_llm.checkpoint.load import find_latest, load
from dist_llm.checkpoint.manifest import DTYPE_BYTES
from dist_llm.checkpoint.save import save, save_over
from dist_llm.errors import CheckpointError, CheckpointMismatch, ExitCode, StorageError
from dist_llm.types import TensorShard, TrainState
from tests.unit.checkpoint.synthetic import (
    LAYOUTS,
    blank,
    cut,
    full_tensors,
    load_on_ranks,
    on_ranks,
    same_bits,
    save_on_ranks,
    small_state,
    split,
)

REPOSITORY = Path(__file__).parents[3]

FACTS: dict[str, object] = {"step": 7, "scale": 65536.0, "nested": {"list": [1, None, True, "ü"]}, "empty": {}}


@pytest.mark.parametrize("saved_as", LAYOUTS)
def test_every_layout_loads_into_every_other(root: Path, saved_as: str) -> None:
    tensors = full_tensors()
    outcomes = save_on_ranks(root, 7, split(tensors, saved_as, FACTS))
    assert outcomes == [root / "step-00000007"] * LAYOUTS[saved_as][0]
    assert verify(root / "step-00000007") == []
    for loaded_as in LAYOUTS:
        expected = split(tensors, loaded_as)
        wanted = blank(expected)
        assert not same_bits(wanted, expected)
        assert load_on_ranks(root / "step-00000007", wanted) == [FACTS] * len(wanted)
        assert same_bits(wanted, expected), f"{saved_as} -> {loaded_as}"


def test_strided_and_trainable_tensors_are_filled_in_place(root: Path) -> None:
    source = torch.arange(24.0).reshape(4, 6)
    save(root, 1, TrainState((TensorShard("w", (6, 4), (0, 0), source.t(), True),)))
    target = torch.zeros(4, 6)
    parameter = torch.nn.Parameter(target.t())
    load(root / "step-00000001", TrainState((TensorShard("w", (6, 4), (0, 0), parameter, True),)))
    assert torch.equal(target, source)
    assert parameter.grad_fn is None


def test_files_are_plain_safetensors_and_checksums_plain_sha256sum(root: Path) -> None:
    tensors = full_tensors()
    path = save(root, 3, split(tensors, "one")[0])
    with safe_open(path / "rank-00000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {name for name, tensor in tensors.items() if tensor.numel()}
        read = {name: file.get_tensor(name) for name in tensors if tensors[name].numel()}
    assert all(torch.equal(read[name].nan_to_num(), tensors[name].nan_to_num()) for name in read)
    for tensor in read_manifest(path)[0].tensors.values():
        assert all(chunk.start % DTYPE_BYTES[tensor.dtype] == 0 for chunk in tensor.chunks)
    subprocess.run(["sha256sum", "-c", "--strict", "manifest.sha256"], cwd=path, check=True, stdout=subprocess.DEVNULL)
    assert {entry.name for entry in path.iterdir()} == {"rank-00000.safetensors", "manifest.json", "manifest.sha256"}


def test_rectangles_are_keyed_by_offsets(root: Path) -> None:
    save_on_ranks(root, 3, split({"w": torch.arange(12.0).reshape(4, 3)}, "zero3"))
    with safe_open(root / "step-00000003" / "rank-00001.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("w|2,0"), torch.arange(6.0, 12.0).reshape(2, 3))


def test_files_are_never_writable_by_others(root: Path) -> None:
    before = os.umask(0)
    try:
        path = save(root, 1, small_state(1.0))
    finally:
        os.umask(before)
    assert all(not entry.stat().st_mode & 0o022 for entry in [root, path, *path.iterdir()])


def test_ranks_with_nothing_to_write_write_no_file(root: Path) -> None:
    states = split({"w": torch.ones(2, 2)}, "zero8")
    save_on_ranks(root, 1, states)
    assert sorted(entry.name for entry in (root / "step-00000001").glob("*.safetensors")) == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert describe(root / "step-00000001")["ranks"] == 8


def test_description_and_parents_chain(root: Path) -> None:
    first, second = save(root, 1, small_state(1.0)), save(root, 2, small_state(2.0))
    told = describe(second)
    assert told["parent"] == describe(first)["manifest_sha256"] != told["manifest_sha256"]
    assert told["tensors"] == {
        "moment": {"dtype": "F64", "shape": [5], "bytes": 40, "chunks": 1},
        "weight": {"dtype": "F32", "shape": [6, 4], "bytes": 96, "chunks": 1},
    }
    assert json.loads(json.dumps(told)) == told
    assert [(row["step"], row["problem"]) for row in list_checkpoints(root)] == [(2, None), (1, None)]


def test_mismatch_lists_every_tensor_and_touches_none(root: Path) -> None:
    tensors = {"same": torch.ones(4), "shape": torch.ones(4, 2), "dtype": torch.ones(3), "gone": torch.ones(2)}
    path = save_on_ranks(root, 1, split(tensors, "zero3"))[0]
    other = {"same": torch.zeros(4), "shape": torch.zeros(2, 4), "dtype": torch.zeros(3).half(), "new": torch.zeros(2)}
    states = split(other, "tp2_dp2")
    for outcome in load_on_ranks(path, states):
        assert isinstance(outcome, CheckpointMismatch)
        assert outcome.exit_code == ExitCode.CONFIG
        assert [violation.key for violation in outcome.violations] == ["dtype", "gone", "new", "shape"]
        assert "shape=F32[2, 4] is F32[4, 2] in the checkpoint" in str(outcome)
    assert all(not shard.data.any() for state in states for shard in state.tensors)


def test_partial_load_takes_what_it_needs(root: Path) -> None:
    path = save(root, 1, small_state(3.0))
    wanted = split({"weight": torch.zeros(6, 4)}, "one")[0]
    with pytest.raises(CheckpointMismatch, match="moment"):
        load(path, wanted)
    assert load(path, wanted, partial=True) == {"value": 3.0}
    assert torch.equal(wanted.tensors[0].data, torch.full((6, 4), 3.0))


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([small_state(1.0, {"bad": float("nan")})], "facts.bad=nan"),
        ([small_state(1.0, {"bad": {3: 1}})], "keys are strings"),
        ([small_state(1.0, {"bad": torch.ones(1)})], "Tensor, not JSON"),
        ([small_state(1.0, {"position": 1}), TrainState((), {"position": 2})], "facts of rank 1"),
        ([TrainState((cut(torch.ones(4, 4), "w", ((0, 0), (4, 3))),))], "exactly once"),
        ([TrainState((cut(torch.ones(4), "w", ((0,), (3,))), cut(torch.ones(4), "w", ((2,), (2,)))))], "exactly once"),
        ([TrainState((cut(torch.ones(4), "w", ((0,), (4,)), primary=False),))], "exactly once"),
        ([TrainState((cut(torch.ones(4), "w", ((0,), (4,))),))] * 2, "exactly once"),
        ([TrainState((cut(torch.ones(4), "w", ((0,), (4,))),) * 2)], "offered twice"),
        ([TrainState((TensorShard("w", (4,), (2,), torch.ones(4), True),))], "reaches outside"),
        ([TrainState((TensorShard("w", (4, 1), (0,), torch.ones(4), True),))], "dims"),
        ([TrainState((TensorShard("w|0", (4,), (0,), torch.ones(4), True),))], "name of a tensor"),
        ([TrainState((TensorShard("w", (2,), (0,), torch.ones(2, dtype=torch.complex64), True),))], "cannot be saved"),
        (
            [
                TrainState((cut(torch.ones(4), "w", ((0,), (4,))),)),
                TrainState((cut(torch.ones(5), "w", ((0,), (0,))),)),
            ],
            "on a rank before it",
        ),
    ],
)
def test_a_state_that_is_not_whole_is_never_committed(root: Path, states: list[TrainState], message: str) -> None:
    for outcome in save_on_ranks(root, 1, states):
        assert isinstance(outcome, IncompleteStateError)
        assert message in str(outcome)
        assert outcome.exit_code == ExitCode.BUG
    assert list(root.iterdir()) == []


def test_a_planner_that_forgets_an_overlap_is_caught(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_on_ranks(root, 1, split({"w": torch.ones(9)}, "zero3"))[0]
    plan = load_module.create_read_items_for_chunk_list
    monkeypatch.setattr(load_module, "create_read_items_for_chunk_list", lambda *given: plan(*given)[1:])
    with pytest.raises(CheckpointError, match="tensor w: the saved rectangles do not cover"):
        load(path, split({"w": torch.zeros(9)}, "one")[0])


def test_no_checkpoint_is_none_and_a_missing_path_is_an_error(root: Path) -> None:
    assert find_latest(root) is None
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load(root / "step-00000001", small_state(0.0))


def test_a_rank_that_cannot_see_the_directory_stops_all(root: Path, tmp_path: Path) -> None:
    roots = [root, tmp_path / "another node"]
    states = split({"w": torch.ones(9)}, "zero3")[:2]
    for outcome in on_ranks(2, lambda channel: save_over(channel, roots[channel.rank], 1, states[channel.rank])):
        assert isinstance(outcome, StorageError)
        assert str(outcome).startswith("rank 1: ")
        assert "shared file system" in str(outcome)
    assert list(root.iterdir()) == []


def test_tools_that_only_look_need_no_torch(root: Path) -> None:
    save(root, 1, small_state(1.0))
    code = (
        "import sys, pathlib; from dist_llm.checkpoint.inspect import verify; import dist_llm.checkpoint.retention;"
        f"print(verify(pathlib.Path({str(root / 'step-00000001')!r})), 'torch' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    ).stdout
    assert told == "[] False\n"


def test_four_gloo_processes_agree(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.checkpoint.gloo_worker"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([*command, str(rank), "4", str(tmp_path)], **pipes, text=True, env=environment, cwd=REPOSITORY)
        for rank in range(4)
    ]
    try:
        told = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, told
    results = [json.loads(out.splitlines()[-1]) for out, _ in told]
    assert results[0]["resharded"] is True
    assert results[0]["flipped"].startswith("CheckpointError: rank 3: ")
    assert results[0]["latest"] == "step-00000001"
    assert results[0]["incomplete"].startswith("IncompleteStateError: the facts of rank 2")
    assert results[0]["full"].startswith("StorageError: rank 1: ")
    assert results == [results[0]] * 4
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert read_manifest(tmp_path / "checkpoints" / "step-00000001")[0].ranks == 4
