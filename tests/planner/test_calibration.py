"""Calibration finds the hardware that made the times, and predicts runs that it has not seen."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_llm.cli.main import main
from dist_llm.cli.rows import read_row
from dist_llm.config.cluster import ClusterConfig
from dist_llm.config.document import render_document
from dist_llm.errors import ExitCode
from dist_llm.planner.calibration import Observation, calibrate, join_repeats, predicted_seconds, settled_seconds

Words = dict[str, object]

SHAPES: list[Words] = [
    {"model.hidden_size": 512, "model.num_layers": 4, "data.seq_len": 256, "data.global_batch": 8},
    {"model.hidden_size": 64, "model.num_layers": 12, "data.seq_len": 64, "data.global_batch": 4},
    {"model.hidden_size": 256, "model.num_layers": 4, "data.seq_len": 128, "data.global_batch": 8, "parallel.data": 2},
    {
        "model.hidden_size": 256,
        "model.num_layers": 6,
        "data.seq_len": 128,
        "data.global_batch": 8,
        "parallel.tensor": 2,
    },
    {"model.hidden_size": 128, "model.num_layers": 8, "data.seq_len": 512, "data.global_batch": 4},
]
UNSEEN: list[Words] = [
    {"model.hidden_size": 384, "model.num_layers": 6, "data.seq_len": 256, "data.global_batch": 8, "parallel.data": 2},
    {"model.hidden_size": 192, "model.num_layers": 8, "data.seq_len": 128, "data.global_batch": 8},
    {
        "model.hidden_size": 256,
        "model.num_layers": 8,
        "data.seq_len": 256,
        "data.global_batch": 4,
        "parallel.tensor": 2,
    },
]


def _observe(words: Words, truth: ClusterConfig | None) -> Observation:
    config, ranks = read_row({"cluster": "cpu", "cluster.devices_per_node": 4, "model.vocab_size": 512, **words})
    name = str(sorted(words.items()))
    blank = Observation(name, config, ranks, 1.0, 1.0)
    seconds = predicted_seconds(blank, truth or config.cluster)
    return Observation(name, config, ranks, seconds, seconds)


@pytest.fixture
def truth() -> ClusterConfig:
    """Return a box unlike the preset: faster cores, slower memory, dearer operations and messages."""
    preset = _observe(SHAPES[0], None).config.cluster
    peaks = preset.peak_tflops.model_copy(update={"fp32": preset.peak_tflops.fp32 * 1.7})
    slow = {"memory_gb_per_second": 5.0, "dispatch_microseconds": 31.0, "link_gb_per_second": 0.9}
    return preset.model_copy(update={"peak_tflops": peaks, **slow, "link_microseconds": 420.0})


def test_unseen_runs_are_predicted(truth: ClusterConfig) -> None:
    observed = [_observe(words, truth) for words in SHAPES]
    found = calibrate(observed[0].config.cluster, observed)
    assert max(map(abs, found.before.values())) > 0.25
    assert found.mean_error < 0.02
    unseen = [_observe(words, truth) for words in UNSEEN]
    for each in unseen:
        assert predicted_seconds(each, found.cluster) == pytest.approx(each.step_seconds, rel=0.05)
    # Uncalibrated the preset is far off; of one run alone its errors may cancel.
    off = [abs(predicted_seconds(each, each.config.cluster) / each.step_seconds - 1) for each in unseen]
    assert sorted(off)[1] > 0.2


def test_what_runs_say_nothing_of_stays(truth: ClusterConfig) -> None:
    alone = [_observe(words, truth) for words in SHAPES if not {"parallel.data", "parallel.tensor"} & {*words}]
    found = calibrate(alone[0].config.cluster, alone)
    before, after = found.moved["link_gb_per_second"]
    assert after == pytest.approx(before, rel=1e-3)


def test_the_first_steps_do_not_count() -> None:
    assert settled_seconds([9.0, 9.0, 1.0, 2.0, 1.0, 1.5, 1.2, 1.1]) == (pytest.approx(1.15), 1.0)


def test_the_fastest_of_repeats_counts(truth: ClusterConfig) -> None:
    first, other = (_observe(words, truth) for words in SHAPES[:2])
    renamed = first.config.model_copy(update={"run": first.config.run.model_copy(update={"name": "again"})})
    again = Observation("again", renamed, first.ranks, first.step_seconds / 2, first.step_seconds / 3)
    least, alone = join_repeats([first, other, again])
    assert (least.name, least.step_seconds) == (first.name, first.step_seconds / 3)
    assert least.repeats == (first.step_seconds, first.step_seconds / 2)
    assert alone == other
    elsewhere = Observation("two ranks", first.config, 2, 1.0, 1.0)
    assert join_repeats([first, elsewhere]) == [first, elsewhere]


def _folder(folder: Path, observation: Observation) -> Path:
    folder.mkdir()
    launcher = observation.config.launcher.model_copy(update={"nproc": observation.ranks})
    config = observation.config.model_copy(update={"launcher": launcher})
    (folder / "config.yaml").write_text(render_document(config))
    line = {"tokens": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "step_seconds": observation.step_seconds}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **line}) + "\n" for step in range(1, 9)))
    return folder


def test_the_command(tmp_path: Path, truth: ClusterConfig, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(_folder(tmp_path / f"run{i}", _observe(words, truth))) for i, words in enumerate(SHAPES)]
    unseen = str(_folder(tmp_path / "unseen", _observe(UNSEEN[0], truth)))
    box = tmp_path / "box.yaml"
    assert main(["plan", "calibrate", *runs, "--hold-out", unseen, "--write", str(box), "--json"]) == ExitCode.DONE
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert abs(answer["held_out"][0]["error"]) < 0.05
    assert ClusterConfig.model_validate(yaml.safe_load(box.read_text())).memory_gb_per_second == pytest.approx(
        5, rel=0.3
    )
    words = [f"{key}={value}" for key, value in UNSEEN[0].items()]
    assert main(["plan", "predict", f"cluster={box}", "model.vocab_size=512", *words, "--json"]) == ExitCode.DONE
    said = json.loads(capsys.readouterr().out)["step_seconds"]
    assert said == pytest.approx(answer["held_out"][0]["predicted_seconds"], rel=1e-6)


def test_figures_that_are_worth_little_are_said_to_be(
    tmp_path: Path, truth: ClusterConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [_folder(tmp_path / f"run{i}", _observe(words, truth)) for i, words in enumerate(SHAPES)]
    assert main(["plan", "calibrate", *map(str, runs), "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["notes"] == []
    shapes: list[Words] = [SHAPES[0], {**SHAPES[0], "data.global_batch": 4}]
    disturbed = [_folder(tmp_path / f"{i}", _observe(words, truth)) for i, words in enumerate(shapes)]
    lines = disturbed[0] / "metrics.jsonl"
    lines.write_text(lines.read_text().replace('"step_seconds": ', '"step_seconds": 1000'))
    assert main(["plan", "calibrate", *map(str, disturbed)]) == ExitCode.DONE
    said = capsys.readouterr().out
    assert "2 runs for 5 figures" in said
    assert "was the machine doing other work?" in said
    assert "do not rely on these figures" in said
    repeat = _folder(tmp_path / "repeat", _observe(SHAPES[0], truth))
    assert main(["plan", "calibrate", str(disturbed[0]), str(repeat)]) == ExitCode.DONE
    assert "its repeats take" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, truth: ClusterConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "calibrate", str(tmp_path)]) == ExitCode.CONFIG
    assert "it is not the folder of a run" in capsys.readouterr().err
    assert main(["plan", "predict", f"cluster={tmp_path / 'none.yaml'}", "model=llama-tiny"]) == ExitCode.CONFIG
    assert "is no file" in capsys.readouterr().err
    short = _folder(tmp_path / "short", _observe(SHAPES[0], truth))
    (short / "metrics.jsonl").write_text("")
    assert main(["plan", "calibrate", str(short)]) == ExitCode.BAD_DATA


def _changed(observation: Observation, section: str, **values: object) -> Observation:
    other = getattr(observation.config, section).model_copy(update=values)
    return replace(
        observation, name=f"{section} {values}", config=observation.config.model_copy(update={section: other})
    )


def test_repeats_are_runs_whose_steps_do_the_same(truth: ClusterConfig) -> None:
    run = _observe(SHAPES[0], truth)
    same = [
        _changed(run, "run", name="again", steps=7, seed=3),
        _changed(run, "launcher", timeout_seconds=9.0),
        _changed(run, "checkpoint", interval=3),
        _changed(run, "telemetry", log_interval=7, tensorboard=False),
        _changed(run, "optimizer", lr=1e-5),
        _changed(run, "data", path="elsewhere"),
    ]
    (joined,) = join_repeats([run, *same])
    assert len(joined.repeats) == 7
    others = [
        _changed(run, "run", deterministic=not run.config.run.deterministic),
        _changed(run, "launcher", threads=3),
        _changed(run, "data", microbatch=2),
        _changed(run, "precision", name="bf16"),
        _changed(run, "parallel", recompute="full"),
        _changed(run, "engine", overlap=not run.config.engine.overlap),
        _changed(run, "cluster", link_microseconds=1.0),
    ]
    assert len(join_repeats([run, *others])) == 8


@pytest.mark.parametrize("figure", ["link_microseconds", "dispatch_microseconds"])
def test_figures_of_nothing_stay(
    tmp_path: Path, truth: ClusterConfig, capsys: pytest.CaptureFixture[str], figure: str
) -> None:
    observed = [_changed(_observe(words, truth), "cluster", **{figure: 0.0}) for words in SHAPES]
    runs = [str(_folder(tmp_path / f"run{i}", each)) for i, each in enumerate(observed)]
    assert main(["plan", "calibrate", *runs, "--json"]) == ExitCode.DONE
    answer = json.loads(capsys.readouterr().out)
    assert (figure in answer["figures"], answer["cluster"][figure]) == (False, 0.0)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1.0", "0.0", "1e308", '"fast"', "true"])
def test_times_that_are_none_are_named(
    tmp_path: Path, truth: ClusterConfig, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    run = _folder(tmp_path / "run", _observe(SHAPES[0], truth))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4].rpartition(": ")[0] + f": {value}}}"
    lines.insert(1, "torn")
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["plan", "calibrate", str(run)]) == ExitCode.BAD_DATA
    assert f"{run / 'metrics.jsonl'}:6: step_seconds=" in capsys.readouterr().err


def test_a_repeat_of_a_fitted_run_is_no_unseen_one(
    tmp_path: Path, truth: ClusterConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(_folder(tmp_path / f"run{i}", _observe(words, truth))) for i, words in enumerate(SHAPES)]
    again = str(_folder(tmp_path / "again", _observe(SHAPES[1], truth)))
    assert main(["plan", "calibrate", *runs, "--hold-out", again]) == ExitCode.CONFIG
    said = capsys.readouterr().err
    assert f"{again} is a repeat of {runs[1]}, which is fitted" in said
    assert main(["plan", "calibrate", *runs, "--hold-out", runs[1]]) == ExitCode.DONE


def test_repeats_that_are_held_out_are_one_run_and_judged_by_their_medians(
    tmp_path: Path, truth: ClusterConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(_folder(tmp_path / f"run{i}", _observe(words, truth))) for i, words in enumerate(SHAPES)]
    unseen = [_observe({**UNSEEN[1], "model.num_layers": layers}, truth) for layers in (3, 4, 5, 6, 7)]
    slower = [replace(each, step_seconds=1.4 * each.step_seconds) for each in unseen]
    held = [
        str(_folder(tmp_path / f"{kind}{i}", each))
        for kind, many in (("one", unseen), ("two", slower), ("three", slower))
        for i, each in enumerate(many)
    ]
    assert main(["plan", "calibrate", *runs, "--hold-out", *held, "--json"]) == ExitCode.DONE
    answer = json.loads(capsys.readouterr().out)
    assert [len(row["repeats"]) for row in answer["held_out"]] == [3] * 5
    assert all(abs(row["error"]) < 0.1 for row in answer["held_out"])
    assert answer["cluster"]["step_error"] == pytest.approx(1 - 1 / 1.4, abs=0.1)
    assert answer["notes"] == []  # a spread of 1.4 is usual


def test_the_machine_s_benchmark_wants_a_round() -> None:
    words = [sys.executable, "-m", "benchmarks.foresight_machine", "--rounds", "0"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--rounds must be at least 1" in ended.stderr
