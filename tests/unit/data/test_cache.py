"""A prepared folder is seen whole or not at all: by racing processes, and whenever its builder is killed."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.data.cache import build_once
from dist_llm.errors import DataError, StorageError
from tests.unit.data.corpora import REPOSITORY, no_report, write_folder
from tests.unit.data.prepare_worker import RACERS


def start(mode: str, tmp_path: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-W", "error", "-m", "tests.unit.data.prepare_worker", mode]
    argv += [str(tmp_path / "corpus"), str(tmp_path / "cache")]
    return subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    return output


def test_of_racing_processes_one_prepares_and_all_get_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus")
    answers = [json.loads(finish(process)) for process in [start("race", tmp_path) for _ in range(RACERS)]]
    assert all(answer["got"] == answers[0]["got"] for answer in answers)
    assert all(str(answer["tokens"]) == answer["got"]["num_tokens"] for answer in answers)
    said = [" ".join(answer["said"]) for answer in answers]
    assert sum("training" in words for words in said) == 1
    assert sum("waiting for" in words for words in said) == RACERS - 1
    assert sum(path.is_dir() for path in (tmp_path / "cache").iterdir()) == 1


def test_a_builder_killed_at_any_point_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 2)
    num_points = int(finish(start("crash", tmp_path)))
    # Cache, lock, private folder, tokenizer, tokens, index, manifest, rename and the flushes of folders.
    assert num_points >= 12


def test_a_failed_build_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "thing"

    def fail(private: Path) -> None:
        (private / "half").write_text("half")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        build_once(folder, fail, no_report)
    assert [path.name for path in folder.parent.iterdir()] == ["thing.lock"]
    build_once(folder, lambda private: None, no_report)
    assert folder.is_dir()


def test_what_is_published_is_never_built_again(tmp_path: Path) -> None:
    folder = tmp_path / "thing"
    folder.mkdir()

    def refuse(private: Path) -> None:
        raise AssertionError(private)

    build_once(folder, refuse, no_report)


def test_a_lock_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, text: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(StorageError, match=r"cannot write .*made\.lock: No space left"):
        build_once(tmp_path / "made", lambda folder: None, no_report)
