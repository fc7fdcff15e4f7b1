"""A run from its command to its files: what it leaves behind, running it again, other layouts and launchers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.tiny_run import (
    FOUR_RANKS,
    ONE_RANK,
    QUIET,
    STEPS,
    TWO_RANKS,
    Place,
    checkpoint_tensors,
    curve,
    end,
    lines,
    run,
    snapshot,
    start,
)
from tests.tolerances import FP32


def test_the_run_folder_is_as_promised(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    promised = {"config.yaml", "metrics.jsonl", "events.jsonl", "tensorboard", "checkpoints", "report.html"}
    assert promised | {"loss.png", "sample.txt"} <= names
    metrics = lines(whole / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    keys = {"step", "tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second", "mfu", "memory_gib"}
    assert all(keys <= line.keys() for line in metrics)
    assert metrics[-1]["tokens"] == STEPS * 8 * 32
    losses = [float(str(line["loss"])) for line in metrics]
    assert sum(losses[-5:]) / 5 < 0.85 * losses[0]
    events = lines(whole / "events.jsonl")
    assert [event["kind"] for event in events] == ["start", *["save"] * (STEPS // 10), "stop"]
    assert all(event["reason"] for event in events)
    assert (events[-1]["step"], events[-1]["code"]) == (STEPS, 0)
    saved = [path.name for path in sorted((whole / "checkpoints").iterdir())]
    assert saved == [f"step-{step:08d}" for step in range(10, STEPS + 1, 10)]
    assert list((whole / "tensorboard").iterdir())
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_launch_says_that_the_run_is_done(place: Place, whole: Path) -> None:
    before = snapshot(whole)
    again = run(["launch", *place.words("whole", *FOUR_RANKS, "telemetry.sample_tokens=8")], place.folder)
    assert again.returncode == 0, again.stderr
    assert "is done" in again.stdout + again.stderr
    assert snapshot(whole) == before


def test_a_done_run_that_lacks_its_report_gets_it(place: Place, copied: Path) -> None:
    (copied / "report.html").unlink()
    done = run(["train", *place.words("copy", *ONE_RANK, "telemetry.sample_tokens=0")], place.folder)
    assert done.returncode == 0, done.stderr
    assert "is done" in done.stdout + done.stderr
    assert (copied / "report.html").is_file()


def test_a_checkpoint_of_four_ranks_resumes_on_one(place: Place, whole: Path) -> None:
    alone = place.runs / "alone"
    shutil.copytree(whole / "checkpoints" / "step-00000020", alone / "checkpoints" / "step-00000020")
    done = run(["train", *place.words("alone", *ONE_RANK, *QUIET, "run.resume=must")], place.folder)
    assert done.returncode == 0, done.stderr
    here, there = curve(alone), curve(whole)
    assert sorted(here) == list(range(21, STEPS + 1))
    for step, figures in here.items():
        assert figures == pytest.approx(there[step], rel=FP32), f"step {step}"


def test_torchrun_and_launch_give_the_same_bits(place: Place) -> None:
    common = (*TWO_RANKS, "run.steps=6", "checkpoint.interval=0", *QUIET)
    launched = run(["launch", *place.words("launched", *common)], place.folder)
    assert launched.returncode == 0, launched.stderr
    log = place.folder / "torchrun.log"
    flags = ["--standalone", "--nproc-per-node=2", "-m", "dist_llm", "train"]
    process = start([*flags, *place.words("torchrun", *common)], log, module="torch.distributed.run")
    try:
        assert process.wait(240) == 0, log.read_text()
    finally:
        end(process)
    assert curve(place.runs / "torchrun") == curve(place.runs / "launched")
    tensors = [checkpoint_tensors(place.runs / name / "checkpoints/step-00000006") for name in ("torchrun", "launched")]
    assert tensors[0] == tensors[1]


def test_the_config_in_the_run_folder_is_the_one_that_cfg_prints(place: Place, whole: Path) -> None:
    words = place.words("whole", *FOUR_RANKS, "telemetry.sample_tokens=8")
    printed = run(["train", "--cfg", *words], place.folder)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.rstrip() == (whole / "config.yaml").read_text().rstrip()


def test_generate_and_checkpoint_verify_read_the_run(place: Place, whole: Path) -> None:
    text = run(["generate", str(whole), "--max-tokens", "5", "--json"], place.folder)
    assert text.returncode == 0, text.stderr
    assert isinstance(json.loads(text.stdout)["text"], str)
    sound = run(["checkpoint", "verify", str(whole), "--json"], place.folder)
    assert sound.returncode == 0, sound.stderr
    assert json.loads(sound.stdout)["ok"] is True


def test_a_done_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(place: Place, copied: Path) -> None:
    last = copied / "checkpoints" / f"step-{STEPS:08d}"
    (last / "rank-00000.safetensors").unlink()
    again = run(["train", *place.words("copy", *ONE_RANK, "telemetry.sample_tokens=8")], place.folder)
    assert again.returncode == 0, again.stderr
    assert "passed over" in again.stderr
    assert [event["kind"] for event in lines(copied / "events.jsonl")][-3:] == ["resume", "save", "stop"]
