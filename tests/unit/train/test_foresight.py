"""A run keeps what was foretold of it, and its report shows that beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_llm.planner.cost.step import predict_step
from dist_llm.telemetry.records import MetricsLine
from dist_llm.telemetry.report import _foretold, _prediction, write_report
from dist_llm.train import foresight
from dist_llm.train.foresight import write_prediction
from tests.parallel.tiny import tiny_config


def test_it_is_what_the_planner_says(tmp_path: Path) -> None:
    config = tiny_config({"data": 2})
    write_prediction(config, 2, tmp_path)
    found = json.loads((tmp_path / "prediction.json").read_text())
    assert found["step_seconds"] == predict_step(config, 2).seconds
    assert found["memory_gib"] > 0
    assert found["loss"] > 2


def test_a_run_does_not_fail_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise KeyError("practice")

    monkeypatch.setattr(foresight, "predict_step", broken)
    write_prediction(tiny_config({}), 1, tmp_path)
    assert not list(tmp_path.iterdir())


def _lines(seconds: list[float]) -> list[MetricsLine]:
    return [MetricsLine(at, at, 4.0, 1.0, 1.0, each, 1.0, None, 2.0, False) for at, each in enumerate(seconds, 1)]


def test_the_report_says_how_far_off_it_was() -> None:
    figures = _foretold(_lines([9.0, 1.0, 1.0, 1.0]), {"step_seconds": 1.5, "memory_gib": 1.0, "loss": 4.0})
    assert [figure.unit for figure in figures] == ["+50% of 1", "-50% of 2", "+0% of 4"]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"step_seconds": "fast", "loss": -1}'])
def test_a_damaged_prediction_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "prediction.json").write_text(text)
    assert _prediction(tmp_path / "prediction.json") == {}
    assert write_report(tmp_path).is_file()
