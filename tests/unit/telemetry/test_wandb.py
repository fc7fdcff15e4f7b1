"""What the tracker hands to wandb, seen through a stand-in module."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dist_llm.telemetry.wandb import WandB
from dist_llm.types import StepRecord


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> Recorder:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_each_step_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, module = Recorder(), ModuleType("wandb")
    module.init = recorder.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    board = WandB(tmp_path / "small", {"run": {"seed": 1}})
    board(StepRecord(3, 30, 2.5, 1.0, 1e-3, 0.1, 100.0, None, 0.5))
    board.close()
    names = [name for name, _ in recorder.calls]
    assert names == ["init", "log", "finish"]
    assert recorder.calls[0][1]["name"] == "small"
    assert recorder.calls[0][1]["config"] == {"run": {"seed": 1}}
    step, values = recorder.calls[1][1]
    assert step == 3
    assert values["loss"] == 2.5
    assert "mfu" not in values
