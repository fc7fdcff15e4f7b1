"""The files of a run that grow: `metrics.jsonl` (a line a step) and `events.jsonl`, and those written whole.

Invariant: every line that a reader finds is one complete JSON object. A line is one unbuffered write; a line torn by
a crash is cut off before the next is appended. Floats are unrounded (shortest text that reads back equal); what is
not finite becomes null, for JSON has no NaN. After a resume a step may appear again: the later line counts.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from dist_llm.errors import StorageError
from dist_llm.types import StepRecord

METRICS_FILE = "metrics.jsonl"
PREDICTION_FILE = "prediction.json"
EVENTS_FILE = "events.jsonl"
VALIDATION_FILE = "validation.jsonl"
SAMPLE_FILE = "sample.txt"
CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.html"

EventKind = Literal["start", "resume", "save", "fault", "rollback", "skip", "stop"]


@dataclass(frozen=True)
class MetricsLine:
    """A line of metrics.jsonl read back; None where the value was not finite or not known."""

    step: int
    tokens: int
    loss: float | None
    grad_norm: float | None
    lr: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    mfu: float | None
    memory_gib: float | None
    skipped: bool | None


class RunFiles:
    """Writer of a run's files; one process of the run has it. Raises StorageError where the system refuses to write."""

    def __init__(self, run_dir: Path) -> None:
        """Create `run_dir` where absent and open its files to append; a torn last line is removed first."""
        self.run_dir = run_dir
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"run.dir: cannot make {run_dir}: {error.strerror}") from error
        self._files = {name: _LineFile(run_dir / name) for name in (METRICS_FILE, EVENTS_FILE)}

    def record(self, record: StepRecord) -> None:
        """Append one step to metrics.jsonl; the line is with the operating system when this returns."""
        self._files[METRICS_FILE].append(record.values())

    def event(self, kind: EventKind, step: int, reason: str, **facts: object) -> None:
        """Append what happened, when and why to events.jsonl, durably. A `stop` carries the exit code as `code`."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._files[EVENTS_FILE].append(
            {"kind": kind, "step": step, "reason": reason, "time": now, **facts}, durable=True
        )

    def validation(self, step: int, loss: float, tokens: int) -> None:
        """Append the mean validation loss (nats a token) over `tokens` tokens to validation.jsonl."""
        if VALIDATION_FILE not in self._files:
            self._files[VALIDATION_FILE] = _LineFile(self.run_dir / VALIDATION_FILE)
        self._files[VALIDATION_FILE].append({"step": step, "loss": loss, "tokens": tokens})

    def write_config(self, text: str) -> None:
        """Put the resolved config into config.yaml, whole or not at all."""
        write_whole(self.run_dir / CONFIG_FILE, text)

    def close(self) -> None:
        """Close the files; appending afterwards is an error."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def finished_step(run_dir: Path, config_text: str) -> int | None:
    """Return the last step of a run of exactly this config that ended well, checkpoint and report kept, else None."""
    try:
        same = (run_dir / CONFIG_FILE).read_text(encoding="utf-8") == config_text
        events = read_lines(run_dir / EVENTS_FILE)
    except (OSError, UnicodeDecodeError, StorageError):
        return None
    stops = [event for event in events if event.get("kind") in ("start", "resume", "stop")]
    if not same or not stops or stops[-1].get("code") != 0:
        return None
    step = stops[-1].get("step")
    if not (run_dir / REPORT_FILE).is_file() or not isinstance(step, int):
        return None
    if not (run_dir / "checkpoints" / f"step-{step:08d}").is_dir():
        return None
    return step


def write_sample(run_dir: Path, text: str) -> None:
    """Put generated text into sample.txt, whole or not at all."""
    write_whole(run_dir / SAMPLE_FILE, text)


def read_metrics(run_dir: Path) -> list[MetricsLine]:
    """Return the steps of a run in order, of a repeated step the last line; empty where there is no file."""
    by_step: dict[int, MetricsLine] = {}
    for line in read_lines(run_dir / METRICS_FILE):
        if isinstance(line.get("step"), int):
            values: dict[str, Any] = {name: line.get(name) for name in MetricsLine.__dataclass_fields__}
            by_step[line["step"]] = MetricsLine(**values)
    return [by_step[step] for step in sorted(by_step)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a JSONL file, empty where there is no file. A torn line is passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    return [parsed for line in lines if (parsed := _parse(line)) is not None]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part: private file, then rename."""
    private = path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")
    try:
        try:
            with private.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            private.replace(path)
        finally:
            private.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


class _LineFile:
    """A JSONL file opened to append, its torn tail cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
            _cut_torn_tail(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    def append(self, line: Mapping[str, object], durable: bool = False) -> None:
        text = json.dumps(_finite(line), allow_nan=False, ensure_ascii=False)
        data = memoryview(text.encode() + b"\n")
        try:
            while data:
                data = data[self._file.write(data) :]
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


def _cut_torn_tail(path: Path) -> None:
    """Remove what follows the last complete JSON line; a machine that lost power can leave zeros there."""
    with path.open("r+b") as file:
        content = file.read()
        kept = len(content)
        while kept:
            start = content.rfind(b"\n", 0, kept - 1) + 1
            if content[kept - 1 : kept] == b"\n" and _parse(content[start : kept - 1]) is not None:
                break
            kept = start
        if kept < len(content):
            file.truncate(kept)
            os.fsync(file.fileno())


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None when it holds no whole one."""
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _finite(value: object) -> object:
    """Return the value as JSON can hold it: non-finite floats as None, mappings and sequences by member, else text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(member) for key, member in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_finite(member) for member in value]
    return str(value)
