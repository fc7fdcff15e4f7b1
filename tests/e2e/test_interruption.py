"""A run that is stopped or loses a rank, and its resumption: bit-equal to the run that nothing interrupted."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.tiny_run import (
    FOUR_RANKS,
    ONE_RANK,
    PATIENCE_SECONDS,
    QUIET,
    STEPS,
    TWO_RANKS,
    Place,
    alive,
    checkpoint_tensors,
    curve,
    end,
    lines,
    ranks_below,
    run,
    start,
    wait_for_step,
    wait_until,
)


def finish(place: Place, name: str, whole: Path) -> None:
    """Resume a run and require that it ends as the uninterrupted one did, to the last bit."""
    resumed = run(["launch", *place.words(name, *FOUR_RANKS, *QUIET)], place.folder)
    assert resumed.returncode == 0, resumed.stderr
    assert curve(place.runs / name) == curve(whole)
    last = f"checkpoints/step-{STEPS:08d}"
    assert checkpoint_tensors(place.runs / name / last) == checkpoint_tensors(whole / last)


def test_a_termination_signal_saves_and_the_resumed_run_is_bit_equal(place: Place, whole: Path) -> None:
    run_dir = place.runs / "preempted"
    log = place.folder / "preempted.log"
    process = start(["launch", *place.words("preempted", *FOUR_RANKS, *QUIET)], log)
    try:
        wait_for_step(run_dir, 3, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 75, log.read_text()
    finally:
        end(process)
    stop = lines(run_dir / "events.jsonl")[-1]
    assert (stop["kind"], stop["code"]) == ("stop", 75)
    stopped = int(str(stop["step"]))
    assert 3 <= stopped < STEPS
    assert (run_dir / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").exists()
    assert len(lines(run_dir / "metrics.jsonl")) == stopped
    finish(place, "preempted", whole)
    resume = next(event for event in lines(run_dir / "events.jsonl") if event["kind"] == "resume")
    assert resume["step"] == stopped


@pytest.mark.parametrize("words", [["train", *ONE_RANK], ["launch", *TWO_RANKS]], ids=["train", "launch"])
def test_a_termination_signal_before_the_first_step_asks_to_be_requeued(place: Place, words: list[str]) -> None:
    command, *layout = words
    fresh = f"data.cache_dir={place.folder / f'cache-{command}'}"
    log = place.folder / f"early-{command}.log"
    process = start([command, *place.words(f"early-{command}", *layout, *QUIET, fresh)], log)
    try:
        wait_until(lambda: "training a tokenizer" in log.read_text(), "the data to be prepared")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 75, log.read_text()
    finally:
        end(process)
    again = run([command, *place.words(f"early-{command}", *layout, *QUIET, fresh, "run.steps=1")], place.folder)
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in lines(place.runs / f"early-{command}" / "metrics.jsonl")] == [1]


def test_a_killed_rank_ends_the_launch_and_the_resumed_run_is_bit_equal(place: Place, whole: Path) -> None:
    run_dir = place.runs / "killed"
    log = place.folder / "killed.log"
    process = start(["launch", *place.words("killed", *FOUR_RANKS, *QUIET)], log)
    try:
        wait_for_step(run_dir, 13, process)
        ranks = ranks_below(process.pid)
        assert sorted(ranks) == [0, 1, 2, 3]
        os.kill(ranks[2], signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(PATIENCE_SECONDS) == 69, log.read_text()
        assert time.monotonic() - began < 30, "the launcher waited for a timeout instead of seeing the death"
    finally:
        end(process)
    wait_until(lambda: not any(map(alive, ranks.values())), "the ranks to end", 5)
    assert "rank 2 of 4 was killed by SIGKILL" in log.read_text()
    finish(place, "killed", whole)
    resume = next(event for event in lines(run_dir / "events.jsonl") if event["kind"] == "resume")
    assert int(str(resume["step"])) >= 10
