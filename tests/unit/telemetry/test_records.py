"""The run's growing files: keys, exact floats, valid JSON, torn tails, refusals of the system."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dist_llm.errors import StorageError
from dist_llm.telemetry.records import EVENTS_FILE, METRICS_FILE, RunFiles, read_lines, read_metrics, write_sample
from tests.unit.telemetry.synthetic import step_record

PROMISED = "step tokens loss grad_norm lr step_seconds tokens_per_second mfu memory_gib".split()


def _refuse_constants(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_a_line_a_step_with_the_promised_keys_and_exact_floats(tmp_path: Path) -> None:
    record = step_record(1, loss=0.1 + 0.2)
    with RunFiles(tmp_path / "runs" / "new") as files:
        files.record(record)
        # Read while the file is open: each line is out when record() returns.
        line = (tmp_path / "runs" / "new" / METRICS_FILE).read_text()
    assert line.count("\n") == 1
    assert line.endswith("\n")
    parsed = json.loads(line)
    assert list(parsed) == [*PROMISED, "skipped"]
    assert parsed["loss"] == 0.1 + 0.2
    assert parsed == {name: getattr(record, name) for name in parsed}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, loss: float) -> None:
    with RunFiles(tmp_path) as files:
        files.record(step_record(1, loss=loss, mfu=None))
        files.event("skip", 1, "not finite", worst=loss, norms=[1.0, loss])
    line = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=_refuse_constants)
    assert line["loss"] is None
    assert line["mfu"] is None
    event = json.loads((tmp_path / EVENTS_FILE).read_text(), parse_constant=_refuse_constants)
    assert event["worst"] is None
    assert event["norms"] == [1.0, None]


def test_events_say_kind_step_reason_time_and_facts(tmp_path: Path) -> None:
    with RunFiles(tmp_path) as files:
        files.event("start", 0, "fresh run", world_size=8)
        files.event("save", 100, "interval", path=tmp_path / "step-00000100")
        files.event("stop", 120, "SIGTERM: saved", code=75)
    events = read_lines(tmp_path / EVENTS_FILE)
    assert [(event["kind"], event["step"]) for event in events] == [("start", 0), ("save", 100), ("stop", 120)]
    assert events[0]["world_size"] == 8
    assert events[1]["path"] == str(tmp_path / "step-00000100")
    assert events[2]["code"] == 75
    assert all(event["reason"] and event["time"].endswith("+00:00") for event in events)


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "lo', b'{"step": 3}', b"\x00" * 700, b"\x00\x00\n", b"\n\n", b'"text"\n'], ids=repr
)
def test_a_torn_tail_is_cut_before_the_next_line(tmp_path: Path, tail: bytes) -> None:
    with RunFiles(tmp_path) as files:
        files.record(step_record(1))
        files.record(step_record(2))
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with RunFiles(tmp_path) as files:
        assert path.read_bytes() == whole
        files.record(step_record(3))
    assert [line.step for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_is_all_torn_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).write_bytes(b'{"kind": "sta')
    RunFiles(tmp_path).close()
    assert (tmp_path / EVENTS_FILE).read_bytes() == b""


def test_every_cut_of_a_file_leaves_whole_lines(tmp_path: Path) -> None:
    with RunFiles(tmp_path) as files:
        for step in (1, 2, 3):
            files.record(step_record(step))
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        RunFiles(tmp_path).close()
        assert len(path.read_bytes()) == max([0, *(end for end in ends if end <= length)])


def test_a_repeated_step_counts_once_and_last(tmp_path: Path) -> None:
    with RunFiles(tmp_path) as files:
        for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5)):
            files.record(step_record(step, loss=loss))
    assert [(line.step, line.loss) for line in read_metrics(tmp_path)] == [(1, 5.0), (2, 4.5), (3, 3.0)]


def test_no_files_are_no_steps(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert read_lines(tmp_path / EVENTS_FILE) == []


def test_config_and_sample_are_whole_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFiles(tmp_path) as files:
        files.write_config("run: {name: first}\n")
        write_sample(tmp_path, "def main():\n    pass\n")

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("dist_llm.telemetry.records.os.fsync", fail)
        with pytest.raises(StorageError, match=r"config.yaml: No space left on device") as caught:
            files.write_config("run: {name: second}\n")
    assert caught.value.exit_code == 74
    assert (tmp_path / "config.yaml").read_text() == "run: {name: first}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml", "events.jsonl", "metrics.jsonl", "sample.txt"
    ]  # fmt: skip


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"run.dir: cannot make .*runs/new"):
        RunFiles(tmp_path / "runs" / "new")


def test_validation_has_its_own_file(tmp_path: Path) -> None:
    with RunFiles(tmp_path) as files:
        files.validation(50, 4.25, tokens=1000)
    assert read_lines(tmp_path / "validation.jsonl") == [{"step": 50, "loss": 4.25, "tokens": 1000}]
