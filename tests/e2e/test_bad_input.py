"""What a user gets wrong: the right exit code, a message that names it, no traceback, and nothing overwritten."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.tiny_run import FOUR_RANKS, QUIET, STEPS, Place, curve, environment, run, snapshot

ALONE = ("run.steps=60", *QUIET)
"""One process, and more steps than the copied run has, so that a mistake that goes unseen would train."""


def refused(done: subprocess.CompletedProcess[str], code: int, *phrases: str) -> None:
    """Require an exit code and a message that holds every phrase once, without a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    spoken = [line for line in done.stderr.splitlines() if line.startswith("dist-llm")]
    assert len(spoken) == 1, done.stderr
    for phrase in phrases:
        assert phrase in done.stderr


def test_an_empty_corpus(place: Place, copied: Path) -> None:
    corpus = place.folder / "empty.txt"
    corpus.write_text("")
    before = snapshot(copied)
    refused(run(["train", *place.words("copy", f"data.path={corpus}", *ALONE)], place.folder), 65, "holds no text")
    assert snapshot(copied) == before


def test_a_corpus_that_is_not_there(place: Place, copied: Path) -> None:
    before = snapshot(copied)
    words = place.words("copy", f"data.path={place.folder / 'absent'}", *ALONE)
    refused(run(["train", *words], place.folder), 74, "data.path", "absent")
    assert snapshot(copied) == before


def test_a_text_file_that_is_not_utf8(place: Place, copied: Path) -> None:
    corpus = place.folder / "latin1.txt"
    corpus.write_bytes(b"caf\xe9 au lait\n" * 1000)
    before = snapshot(copied)
    refused(run(["train", *place.words("copy", f"data.path={corpus}", *ALONE)], place.folder), 65, "latin1.txt")
    assert snapshot(copied) == before


@pytest.mark.parametrize(
    ("setting", "phrases"),
    [
        ("model.vocab_size=50000", ("model.vocab_size=50000", "; use ")),
        ("model.hidden_size=64", ("model.hidden_size=64", "use 32")),
        ("run.resume=never", ("run.resume=never", "already holds a run")),
    ],
    ids=["vocabulary-larger-than-the-corpus-supports", "checkpoint-of-another-model", "afresh-over-a-run"],
)
def test_a_setting_that_the_data_or_the_run_contradicts(
    place: Place, copied: Path, setting: str, phrases: tuple[str, ...]
) -> None:
    before = snapshot(copied)
    refused(run(["train", *place.words("copy", setting, *ALONE)], place.folder), 78, *phrases)
    assert snapshot(copied) == before


def test_a_run_of_another_model_that_left_no_checkpoint(place: Place, copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    before = snapshot(copied)
    done = run(["train", *place.words("copy", "model.hidden_size=64", *ALONE)], place.folder)
    refused(done, 78, "model.hidden_size=64", "use 32")
    assert snapshot(copied) == before


def test_three_ranks_for_a_layout_of_four(place: Place, copied: Path) -> None:
    before = snapshot(copied)
    words = place.words("copy", *FOUR_RANKS, *ALONE)
    launched = run(["launch", *words, "launcher.nproc=3"], place.folder)
    refused(launched, 78, "4")
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    numbered = environment(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0", LOCAL_WORLD_SIZE="3", **store)
    refused(run(["train", *words], place.folder, numbered), 78, "3", "4")
    assert snapshot(copied) == before


def test_a_damaged_checkpoint_is_passed_over(place: Place, copied: Path) -> None:
    newest = copied / "checkpoints" / f"step-{STEPS:08d}"
    damaged = newest / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    verified = run(["checkpoint", "verify", str(newest)], place.folder)
    assert verified.returncode == 65, verified.stdout
    resumed = run(["train", *place.words("copy", *QUIET)], place.folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "is passed over" in resumed.stderr
    assert '"step": 30, "reason": "from checkpoint 30"' in (copied / "events.jsonl").read_text()
    assert sorted(curve(copied)) == list(range(1, STEPS + 1))
    assert run(["checkpoint", "verify", str(newest)], place.folder).returncode == 0


def test_a_run_folder_that_cannot_be_written(place: Place) -> None:
    runs = place.folder / "file"
    runs.write_text("not a folder")
    done = run(["train", *place.words("new", f"run.dir={runs}", *ALONE)], place.folder)
    refused(done, 74, "run.dir")
    assert runs.read_text() == "not a folder"


@pytest.mark.parametrize("words", [["train", "model.num_layer=2"], ["train", "run.steps=-1", "parallel.tensor=3"]])
def test_a_config_error_costs_no_torch(place: Place, words: list[str]) -> None:
    trace = environment(PYTHONPROFILEIMPORTTIME="1")
    done = run(words, place.folder, trace)
    assert done.returncode == 78, done.stderr
    assert words[-1] in done.stderr
    assert not any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())
