"""What `bench step` makes of what ranks measured, and which engines it times."""

from __future__ import annotations

import pytest
import torch

from dist_llm.accounting.flops import step_flops
from dist_llm.errors import ConfigError
from dist_llm.train.bench_step import (
    End,
    Measured,
    Start,
    choose_engines,
    figures,
    random_batch,
    traffic_rows,
)
from dist_llm.types import DataSlice
from tests.parallel.tiny import GPT2, tiny_config


def _start(**traffic: list[int]) -> Start:
    return Start("cpu", "x86_64", 1, traffic)


STARTS = [_start(all_reduce=[2, 200, 100]), _start(all_reduce=[1, 50, 25], send=[3, 30, 30])]
MEASURED = Measured(
    {"native": STARTS, "deepspeed": [_start(), _start()]},
    {"native": [2.0, 4.0, 3.0], "deepspeed": [4.0, 4.0, 4.0]},
    {"native": [End(1.5, 10, 0.5), End(1.25, 30, 0.5)], "deepspeed": [End(2.0, 40, 0.5)] * 2},
)


def test_figures_are_medians_and_ratios_are_within_rounds() -> None:
    config = tiny_config()
    row = figures(config, MEASURED, "deepspeed", "native")
    assert (row["step_seconds"], row["fastest_step_seconds"], row["slowest_step_seconds"]) == (4.0, 4.0, 4.0)
    assert (row["ratio"], row["least_ratio"], row["greatest_ratio"]) == (0.75, 0.5, 1.0)
    native = figures(config, MEASURED, "native", "native")
    assert native["step_seconds"] == 3.0
    assert native["tokens_per_second"] == 8 * 16 / 3.0
    assert (native["collectives"], native["payload_bytes"], native["sent_bytes"]) == (4, 200, 100)
    assert (native["peak_memory_gib"], native["state_bytes"], native["ratio"]) == (1.5, 30, 1.0)


def test_mfu_divides_by_the_peak_of_the_devices_there_are() -> None:
    config = tiny_config()
    cluster = config.cluster.model_copy(update={"devices_per_node": 4})
    found = figures(config.model_copy(update={"cluster": cluster}), MEASURED, "native", "native")["mfu"]
    assert found == pytest.approx(step_flops(config.model, 16, 8) / 3.0 / 4e12)
    elsewhere = config.model_copy(update={"cluster": cluster.model_copy(update={"device": "cuda"})})
    assert figures(elsewhere, MEASURED, "native", "native")["mfu"] is None


def test_traffic_is_of_the_rank_with_most_and_of_all() -> None:
    reduced, sent = traffic_rows("native", STARTS)
    assert reduced == {
        "engine": "native",
        "kind": "all_reduce",
        "count": 2,
        "all_count": 3,
        "payload_bytes": 200,
        "all_payload_bytes": 250,
        "sent_bytes": 100,
        "all_sent_bytes": 125,
    }
    assert (sent["kind"], sent["count"], sent["all_count"]) == ("send", 3, 3)


def test_shares_of_a_random_batch_make_up_the_whole() -> None:
    config = tiny_config(data={"document_mask": True})
    whole = random_batch(config, DataSlice(0, 1), 3)
    parts = [random_batch(config, DataSlice(index, 4), 3) for index in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.samples for part in parts]), whole.samples)
    assert torch.equal(whole.tokens[:, 1:], whole.targets[:, :-1])
    assert whole.documents is not None
    assert whole.documents.shape == whole.tokens.shape


def test_engines_that_cannot_run_the_layout_are_listed_unless_they_were_named() -> None:
    staged = tiny_config({"pipeline": 2}, launcher={"nproc": 2})
    able, left_out = choose_engines(staged, None)
    assert able == ("native", "megatron")
    assert "runs no pipeline" in left_out["deepspeed"]
    with pytest.raises(ConfigError, match="runs no pipeline"):
        choose_engines(staged, ("native", "deepspeed"))
    assert choose_engines(tiny_config({}, GPT2), ("native", "deepspeed")) == (("native", "deepspeed"), {})


def test_a_layout_that_no_engine_runs_is_refused_as_the_native_one_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor=3 must"):
        choose_engines(tiny_config({"tensor": 3}, launcher={"nproc": 3}), None)
    with pytest.raises(ConfigError, match=r"launcher\.nproc=32 is more than one machine is asked to start"):
        choose_engines(tiny_config({}, launcher={"nproc": 32}), None)
