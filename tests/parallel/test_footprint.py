"""A prediction without torch is what a dry run says and what ranks hold: state to the byte, activations within 5 %."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.foresight_machine import memory_error
from dist_llm.planner.footprint import predict_memory
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.dry_run import dry_run
from tests.parallel.test_dry_run import measured
from tests.parallel.tiny import GPT2, MOE, tiny_config

SIZED: dict[str, object] = {
    "hidden_size": 128,
    "num_heads": 8,
    "num_kv_heads": 4,
    "ffn_hidden_size": 352,
    "vocab_size": 512,
    "max_seq_len": 128,
}
WIDE_MOE: dict[str, object] = {**SIZED, **MOE, "moe": {**MOE["moe"], "ffn_hidden_size": 96}}  # type: ignore[dict-item]
SIZED_GPT2: dict[str, object] = {**GPT2, **SIZED, "num_kv_heads": None}
SELECTIVE = {"recompute": "selective", "recompute_operators": ["core_attn", "norm", "activation"]}

CASES = [
    (1, {}, SIZED, "fp32"),
    (1, {}, {**SIZED, "qk_norm": True, "norm_placement": "post"}, "bf16"),
    (1, {"recompute": "full", "recompute_layers": 2}, SIZED, "bf16"),
    (1, SELECTIVE, SIZED, "fp32"),
    (2, {"zero": 3, **SELECTIVE}, SIZED_GPT2, "bf16"),
    (2, {"zero": 0, "recompute": "full"}, WIDE_MOE, "fp32"),
    (2, {"tensor": 2, "sequence": True}, SIZED_GPT2, "bf16"),
    (2, {"tensor": 2, "recompute": "selective", "recompute_operators": ["core_attn", "mlp"]}, WIDE_MOE, "fp32"),
    (4, {"context": 4}, SIZED, "bf16"),
    (2, {"context": 2, "context_method": "ulysses"}, SIZED, "fp32"),
    (4, {"expert": 2, "tensor": 2, "sequence": True, "zero": 2}, WIDE_MOE, "bf16"),
    (4, {"pipeline": 4, "schedule": "1f1b"}, SIZED_GPT2, "bf16"),
    (2, {"pipeline": 2, "schedule": "gpipe"}, SIZED, "fp32"),
    (4, {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved", "zero": 2}, WIDE_MOE, "fp32"),
    (2, {"pipeline": 2, "schedule": "zero_bubble"}, SIZED_GPT2, "bf16"),
    (4, {"pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence": True}, SIZED, "fp32"),
    (2, {"pipeline": 2, "schedule": "dualpipev", "recompute": "full"}, SIZED, "fp32"),
]
DATA: dict[str, object] = {"seq_len": 128, "microbatch": 2, "global_batch": 16}


@pytest.mark.parametrize(("ranks", "parallel", "model", "precision"), CASES, ids=str)
def test_a_prediction_is_what_a_dry_run_says(
    ranks: int, parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    config = tiny_config(parallel, model, DATA, precision={"name": precision})
    rows: Any = dry_run(config, ranks)["pipeline_ranks"]
    for row, rank in zip(rows, predict_memory(config, ranks).ranks, strict=True):
        found = rank.components
        state = (found.parameters, found.gathered, found.gradients, found.optimizer)
        keys = ("param_bytes", "gathered_param_bytes", "grad_bytes", "optimizer_bytes")
        assert state == tuple(row[key] for key in keys)
        activations = found.activations + found.logits + found.buffers
        assert activations == pytest.approx(row["peak_activation_bytes"], rel=0.05)
        assert found.allocated == pytest.approx(row["peak_bytes"], rel=0.05)


RUNS = [
    (1, {}, SIZED_GPT2, "fp32"),
    (2, {"zero": 1, "recompute": "full"}, SIZED, "bf16"),
    (2, {"tensor": 2, "sequence": True}, SIZED, "bf16"),
    (2, {"context": 2}, SIZED, "fp32"),
    (2, {"pipeline": 2}, SIZED, "fp32"),
    (4, {"pipeline": 2, "schedule": "zero_bubble", "zero": 1}, SIZED, "fp32"),
]


@pytest.mark.parametrize(("ranks", "parallel", "model", "precision"), RUNS, ids=str)
def test_a_prediction_is_what_ranks_hold(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    config = tiny_config(parallel, model, DATA, precision={"name": precision})
    found = [rank.components for rank in predict_memory(config, ranks).ranks]
    for seen in pool.run(measured, config, world=ranks):
        rank = found[seen["pipeline_rank"]]
        assert (rank.parameters, rank.optimizer) == (seen["param_bytes"], seen["optimizer_bytes"])
        activations = rank.activations + rank.logits + rank.buffers
        assert activations == pytest.approx(seen["peak_activation_bytes"], rel=0.05)


ALONE: dict[str, object] = {**DATA, "global_batch": 4, "microbatch": 4}
WHOLE = [
    (1, {}, SIZED, ALONE),
    (1, {}, SIZED, DATA),
    (2, {"zero": 0}, SIZED, {**ALONE, "microbatch": 2}),
    (2, {"zero": 1}, SIZED, {**ALONE, "microbatch": 2}),
    (2, {"zero": 3}, SIZED, DATA),
    (2, {"zero": 2}, SIZED_GPT2, {**ALONE, "microbatch": 2}),
    (2, {"tensor": 2, "sequence": True}, SIZED, ALONE),
]


@pytest.mark.parametrize(("ranks", "parallel", "model", "data"), WHOLE, ids=str)
def test_the_most_bytes_that_live_at_once(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object], data: dict[str, object]
) -> None:
    """Of all tensors together: with one microbatch a step, gradients come as activations go."""
    config = tiny_config(parallel, model, data)
    launcher = config.launcher.model_copy(update={"nproc": ranks})
    assert abs(memory_error(pool, config.model_copy(update={"launcher": launcher}))) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reference_loss_keeps_probabilities_beside_the_logits(precision: str) -> None:
    """And is foretold so, by the planner and by a dry run."""
    found = {}
    for backend in ("reference", "native"):
        sections = {"precision": {"name": precision}, "kernels": {"cross_entropy": backend}}
        config = tiny_config(None, {**SIZED, "vocab_size": 8192}, DATA, **sections)
        rows: Any = dry_run(config, 1)["pipeline_ranks"]
        rank = predict_memory(config, 1).ranks[0].components
        found[backend] = rank.activations + rank.logits + rank.buffers
        assert found[backend] == pytest.approx(rows[0]["peak_activation_bytes"], rel=0.05)
    assert found["native"] < 0.95 * found["reference"]
