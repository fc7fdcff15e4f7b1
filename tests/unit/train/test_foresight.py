"""A run keeps what was foretold of it, and its report shows that beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_llm.cli.main import main
from dist_llm.errors import ExitCode
from dist_llm.planner.cost.step import predict_step
from dist_llm.telemetry.report import _prediction, compare_foretold, run_figures, write_report
from dist_llm.train import foresight
from dist_llm.train.foresight import write_prediction
from tests.parallel.tiny import tiny_config


def test_it_is_what_the_planner_says(tmp_path: Path) -> None:
    config = tiny_config({"data": 2})
    write_prediction(config, 2, tmp_path)
    found = json.loads((tmp_path / "prediction.json").read_text())
    assert found["step_seconds"] == predict_step(config, 2).seconds
    assert found["memory_gib"] > 0
    # The law says more of so small a model than guessing has.
    assert found["loss"] is None


def test_a_law_is_quoted_where_it_says_less_than_guessing(tmp_path: Path) -> None:
    config = tiny_config({}, {"hidden_size": 512, "ffn_hidden_size": 2048, "vocab_size": 50000}, {"global_batch": 4096})
    long = config.model_copy(update={"run": config.run.model_copy(update={"steps": 10000})})
    write_prediction(long, 1, tmp_path)
    assert 2 < json.loads((tmp_path / "prediction.json").read_text())["loss"] < 10


def test_a_run_does_not_fail_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise KeyError("practice")

    monkeypatch.setattr(foresight, "predict_step", broken)
    write_prediction(tiny_config({}), 1, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run with a slow first step, foretold at half as long again and half the memory."""
    measured = {"tokens": 1, "loss": 4.0, "grad_norm": 1.0, "lr": 1.0, "memory_gib": 2.0, "skipped": False}
    lines = [{"step": step, "step_seconds": each, **measured} for step, each in enumerate([9.0, 1.0, 1.0, 1.0], 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "prediction.json").write_text('{"step_seconds": 1.5, "memory_gib": 1.0, "loss": 4.0}')
    (tmp_path / "config.yaml").write_text("{}\n")
    return tmp_path


def test_the_report_says_how_far_off_it_was(run: Path) -> None:
    assert [figure.unit for figure in run_figures(run)][-3:] == ["+50% of 1", "-50% of 2", "+0% of 4"]
    assert compare_foretold(run)["step_seconds"].error == pytest.approx(0.5)


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == ExitCode.DONE
    said = json.loads(capsys.readouterr().out)
    assert said["foretold"]["memory_gib"] == {"foretold": 1.0, "measured": 2.0, "error": -0.5}
    assert "+50% of 1" in Path(said["report"]).read_text()
    assert main(["report", str(run.parent / "none")]) == ExitCode.CONFIG
    assert "it is not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"step_seconds": "fast", "loss": -1}'])
def test_a_damaged_prediction_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "prediction.json").write_text(text)
    assert _prediction(tmp_path / "prediction.json") == {}
    assert write_report(tmp_path).is_file()
