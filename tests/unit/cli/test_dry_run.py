"""`plan dry-run` says what every rank of a world would hold, and refuses what cannot be built."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dist_llm.accounting.memory import place_of, step_bytes
from dist_llm.cli.main import main
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.training import PrecisionConfig
from dist_llm.errors import ExitCode

WORDS = ["plan", "dry-run", "model=llama-tiny", "data.seq_len=64", "data.microbatch=1", "--json"]


def _dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*WORDS, *words]) == ExitCode.DONE
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_the_batch_fills_the_pipeline_and_shards_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    layout = {"tensor": 2, "pipeline": 2, "data": 8, "zero": 1, "sequence": True}
    said = _dry_run(capsys, *(f"parallel.{key}={value}" for key, value in layout.items()))
    assert (said["ranks"], said["microbatches"], said["global_batch"]) == (32, 2, 16)
    parallel = ParallelConfig.model_validate(layout)
    for index, stage in enumerate(said["stages"]):
        model = _model("llama-tiny")
        formula = step_bytes(model, parallel, PrecisionConfig(), place_of(parallel, 8, index, 0), 2).before_update
        assert (stage["param_bytes"], stage["optimizer_bytes"]) == (formula.parameters, formula.optimizer)
        assert stage["grad_bytes"] == stage["gathered_param_bytes"] >= 8 * (stage["param_bytes"] - 64)
        assert stage["peak_activation_bytes"] > 0
        assert stage["traffic"]["tp"]["all_gather"]["count"] > 0


def test_what_the_fullest_device_holds_in_all_is_set_against_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("cluster=h100-sxm", "parallel.data=1")
    said = _dry_run(capsys, *words)
    assert said["fits"]
    peak = said["pipeline_ranks"][0]["peak_bytes"]
    assert said["device_bytes"] == pytest.approx((peak + 104 * 2**20) * 1.08 + 3 * 2**30, rel=0.01)
    assert not _dry_run(capsys, *words, "cluster.memory_gib=1")["fits"]


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_batch_that_is_said_is_taken(capsys: pytest.CaptureFixture[str], prefix: str) -> None:
    assert _dry_run(capsys, "parallel.data=2", f"{prefix}data.global_batch=12")["microbatches"] == 6


def test_recompute_holds_less_and_a_wider_vocabulary_more(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = [
        _dry_run(capsys, *words)["pipeline_ranks"][0]["peak_activation_bytes"]
        for words in (["parallel.recompute=full"], [], ["model.vocab_size=4000"])
    ]
    assert peaks == sorted(set(peaks))


def test_what_is_illegal_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel.tensor=3", "parallel.pipeline=64", "parallel.zero=0", "parallel.replicate=2", "parallel.data=2"]
    assert main([*WORDS, *words]) == ExitCode.CONFIG
    errors = capsys.readouterr().err
    assert all(key in errors for key in ("parallel.tensor=3", "parallel.pipeline=64", "parallel.replicate=2"))
    assert main([*WORDS, "--ranks", "0"]) == ExitCode.CONFIG


def _model(preset: str) -> ModelConfig:
    from dist_llm.cli.compose import compose
    from dist_llm.config.decode import decode

    return decode(compose([f"model={preset}"])).model
