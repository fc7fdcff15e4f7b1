"""What a dry run says of a rank equals what the rank then holds: state exactly, the peak of activations within 5 %."""

from __future__ import annotations

from typing import Any

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.parallel.activations import ActivationLog
from dist_llm.parallel.live import gradients, host_bytes, parameters, storage_bytes
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.dry_run import dry_run, state_groups
from tests.parallel.tiny import GPT2, build, random_batch, tiny_config


def measured(config: RunConfig) -> dict[str, int]:
    """Train two steps on this rank; return bytes of its shards, its optimizer and the second step's activations."""
    engine = build(config)
    log = ActivationLog(state_groups(engine._mesh))

    def observe(phase: str) -> None:
        for stage in engine.stages:
            log.exclude((*parameters(stage.part.model), *gradients(stage.part.model)))

    engine.observe = observe
    with log:
        engine.train_step(random_batch(config, engine.data_slice, 0))
        start = log.mark()
        engine.train_step(random_batch(config, engine.data_slice, 1))
    offload = config.parallel.offload
    moments = storage_bytes(t for slot in engine.optimizer.slots for t in (slot.exp_avg, slot.exp_avg_sq))
    if offload == "parameters":
        moments += sum(host_bytes(stage.part.model) for stage in engine.stages)
    return {
        "pipeline_rank": engine._mesh.pp.index,
        "param_bytes": storage_bytes(shard.tensor for shard in engine.shards) * (offload != "parameters"),
        "optimizer_bytes": moments * (offload == "none"),
        "host_bytes": storage_bytes(engine.optimizer.host_tensors) + moments * (offload == "parameters"),
        "peak_activation_bytes": log.peak(start, log.mark()),
    }


WIDE: dict[str, object] = {"hidden_size": 64, "ffn_hidden_size": 160}
CASES = [
    (1, {}, {}, "fp32"),
    (1, {"recompute": "full"}, WIDE, "fp32"),
    (2, {"zero": 1}, {}, "bf16"),
    (2, {"zero": 3}, {**GPT2, **WIDE, "num_kv_heads": None}, "fp32"),
    (2, {"zero": 1, "offload": "optimizer"}, WIDE, "bf16"),
    (2, {"zero": 3, "offload": "parameters"}, WIDE, "fp32"),
    (2, {"zero": 0}, WIDE, "fp32"),
    (2, {"tensor": 2, "sequence": True}, WIDE, "bf16"),
    (2, {"context": 2}, WIDE, "fp32"),
    (4, {"pipeline": 4, "zero": 0}, WIDE, "fp32"),
    (4, {"pipeline": 2, "zero": 2}, WIDE, "bf16"),
    (2, {"pipeline": 2, "schedule": "gpipe"}, {"vocab_size": 1000}, "fp32"),
    (2, {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}, WIDE, "fp32"),
    (4, {"pipeline": 2, "schedule": "zero_bubble", "zero": 1}, WIDE, "fp32"),
    (2, {"pipeline": 2, "schedule": "zbv"}, WIDE, "fp32"),
    (2, {"pipeline": 2, "schedule": "dualpipev"}, WIDE, "fp32"),
]


@pytest.mark.parametrize(("ranks", "parallel", "model", "precision"), CASES, ids=str)
def test_a_dry_run_foretells_what_ranks_hold(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    config = tiny_config(parallel, model, {"microbatch": 1, "global_batch": 8}, precision={"name": precision})
    rows: Any = dry_run(config, ranks)["pipeline_ranks"]
    seen = pool.run(measured, config, world=ranks)
    for row in rows:
        here = next(rank for rank in seen if rank["pipeline_rank"] == row["pipeline_rank"])
        assert here["param_bytes"] == row["param_bytes"]
        assert here["optimizer_bytes"] == row["optimizer_bytes"]
        assert here["host_bytes"] == row["host_bytes"]
        assert row["peak_activation_bytes"] == pytest.approx(here["peak_activation_bytes"], rel=0.05)
