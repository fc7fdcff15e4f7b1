"""`dist-llm bench step` as a user starts it: real ranks of their own, one JSON object on stdout, nothing prepared."""

from __future__ import annotations

import json

from dist_llm.errors import ExitCode
from tests.e2e.tiny_run import Place, run

MEASURE = ("--steps", "1", "--repeats", "2", "--json")


def test_a_step_is_timed_and_its_collectives_are_counted(place: Place) -> None:
    words = place.words("bench", "parallel.data=2", "launcher.nproc=2", "data.path=nowhere", "engine=native")
    done = run(["bench", "step", *words, *MEASURE], place.folder)
    assert done.returncode == ExitCode.DONE, done.stderr
    facts = json.loads(done.stdout)
    (row,) = facts["engines"]
    assert (row["engine"], row["ratio"], facts["reference"]) == ("native", 1.0, "native")
    assert row["step_seconds"] > 0
    assert row["peak_memory_gib"] > 0
    assert len(facts["rounds"]["native"]) == 2
    kinds = {traffic["kind"]: traffic for traffic in facts["collectives"]}
    assert kinds["reduce_scatter"]["count"] == kinds["all_gather"]["count"] > 0
    assert kinds["reduce_scatter"]["all_count"] == 2 * kinds["reduce_scatter"]["count"]
    assert row["sent_bytes"] == sum(traffic["sent_bytes"] for traffic in kinds.values())
    assert "round 2 of 2: native" in done.stderr
    assert not place.runs.joinpath("bench").exists()


def test_an_engine_that_cannot_run_the_layout_is_refused_by_name(place: Place) -> None:
    words = place.words("bench", "parallel.pipeline=2", "launcher.nproc=2", "engine=native,deepspeed")
    done = run(["bench", "step", *words, *MEASURE], place.folder)
    assert done.returncode == ExitCode.CONFIG
    assert "engine.name=deepspeed runs no pipeline" in done.stderr
    assert json.loads(done.stdout)["ok"] is False
