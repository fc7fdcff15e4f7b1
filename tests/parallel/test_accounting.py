"""What a step holds and sends equals the formulas of accounting/, byte for byte and collective for collective."""

from __future__ import annotations

from typing import Any

import pytest

from dist_llm.accounting.memory import StateBytes, StepBytes, place_of, step_bytes
from dist_llm.accounting.traffic import Shapes, step_traffic
from dist_llm.config.run import RunConfig
from dist_llm.parallel.live import gradient_bytes, host_bytes, parameter_bytes, storage_bytes
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.ledger import Ledger
from tests.parallel.tiny import GPT2, MOE, SIGMOID_MOE, build, random_batch, tiny_config


def measured_and_formula(config: RunConfig) -> dict[str, tuple[object, object]]:
    """Run two steps on this rank; return measured and predicted state bytes and traffic of the second."""
    engine = build(config)
    engine.train_step(random_batch(config, engine.data_slice, 0))
    seen: dict[str, StateBytes] = {}

    def observe(phase: str) -> None:
        models = [stage.part.model for stage in engine.stages]
        optimizer = storage_bytes([t for slot in engine.optimizer.slots for t in (slot.exp_avg, slot.exp_avg_sq)])
        kept = [sum(host_bytes(model) for model in models), storage_bytes(engine.optimizer.host_tensors)]
        on_host = any(kept)
        seen[phase] = StateBytes(
            sum(parameter_bytes(model) for model in models),
            sum(gradient_bytes(model) for model in models),
            0 if on_host else optimizer,
            sum(kept) + (optimizer if kept[0] else 0),
        )

    engine.observe = observe
    with Ledger(engine._mesh) as ledger:
        engine.train_step(random_batch(config, engine.data_slice, 1))
    mesh = engine._mesh
    place = place_of(config.parallel, mesh.dp.size, mesh.pp.index, mesh.zero.index)
    microbatches = config.data.global_batch // (mesh.dp.size * config.data.microbatch)
    formula = step_bytes(config.model, config.parallel, config.precision, place, microbatches)
    traffic = step_traffic(Shapes(config.model, config.parallel, config.precision, config.data, place, mesh.dp.size))
    measured = StepBytes(seen["last_forward"], seen["before_update"], seen["after_update"])
    return {
        "state bytes": (measured, formula),
        "collectives": (dict(ledger.counts), ledger.merged(traffic.counts)),
        "payload bytes": (dict(ledger.bytes), ledger.merged(traffic.payload_bytes)),
    }


def assert_equal(reports: list[dict[str, Any]], dropless: bool = False) -> None:
    """dropless: what each rank sends to experts depends on the tokens; over all ranks it does not."""
    sent = [0, 0]
    for rank, report in enumerate(reports):
        for side, payload in enumerate(report["payload bytes"] if dropless else ()):
            sent[side] += sum(payload.pop(key) for key in list(payload) if key[1] == "all_to_all")
        for what, (measured, formula) in report.items():
            assert measured == formula, f"{what} of rank {rank}"
    assert sent[0] == sent[1]


MEMORY_CASES = [
    (ranks, {"zero": zero, **parallel}, model)
    for zero in (0, 1, 2, 3)
    for ranks, parallel, model in (
        (2, {}, {}),
        (3, {}, {"hidden_size": 32, "vocab_size": 50}),
        (4, {"pipeline": 2}, {}),
        (4, {"tensor": 2, "sequence": True}, GPT2),
        (4, {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}, {"tie_embeddings": False}),
    )
]


@pytest.mark.parametrize(("ranks", "parallel", "model"), MEMORY_CASES, ids=str)
def test_live_bytes_and_collectives_equal_the_formulas(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object]
) -> None:
    batch: dict[str, object] = {"global_batch": 12} if ranks == 3 else {}
    assert_equal(pool.run(measured_and_formula, tiny_config(parallel, model, batch), world=ranks))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_low_precision_keeps_fp32_masters(pool: WorkerPool, zero: int) -> None:
    config = tiny_config({"zero": zero}, precision={"name": "bf16"})
    assert_equal(pool.run(measured_and_formula, config, world=2))
    split: dict[str, object] = {"zero": zero, "pipeline": 2, "virtual_pipeline": 2, "schedule": "zero_bubble"}
    assert_equal(pool.run(measured_and_formula, tiny_config(split, precision={"name": "bf16"}), world=4))


MIXED: dict[str, object] = {"context_method": "mixed", "context_heads": 2}
SELECTIVE = {"recompute": "selective", "recompute_operators": ["core_attn", "norm", "mlp"]}

MORE_TRAFFIC = [
    (2, {"tensor": 2, "zero": 0}, {}),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}, {}),
    (2, {"tensor": 2, "recompute": "full"}, GPT2),
    (2, {"tensor": 2, "sequence": True, "recompute": "full", "recompute_layers": 3}, GPT2),
    (2, {"tensor": 2, "sequence": True, **SELECTIVE}, GPT2),
    (4, {"tensor": 2, "pipeline": 2, "schedule": "zbv", **SELECTIVE}, {}),
    (4, {"context": 2, "pipeline": 2, **SELECTIVE, "recompute_layers": 1}, {}),
    (4, {"context": 2, "context_method": "ulysses", "zero": 3, **SELECTIVE}, {}),
    (4, {"zero": 2, "replicate": 2}, {}),
    (2, {"pipeline": 2, "schedule": "gpipe", "zero": 0}, {}),
    (8, {"tensor": 2, "sequence": True, "pipeline": 2, "zero": 1}, {}),
    *(
        (4, {"pipeline": 2, "schedule": schedule, "zero": zero}, GPT2)
        for schedule in ("zero_bubble", "zbv", "dualpipev")
        for zero in (0, 2, 3)
    ),
    (8, {"pipeline": 4, "schedule": "zero_bubble", "zero": 1}, {}),
    (8, {"pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence": True, "zero": 2}, {}),
    (8, {"pipeline": 2, "schedule": "zbv", "replicate": 2, "zero": 2}, {}),
    (4, {"context": 4, "zero": 1}, {}),
    (8, {"context": 2, "tensor": 2, "sequence": True, "pipeline": 2, "zero": 2, "recompute": "full"}, {}),
    (4, {"context": 2, "context_method": "ulysses", "tensor": 2, "zero": 0}, GPT2),
    (4, {"context": 2, "context_method": "ulysses", "data": 2, "zero": 3, "recompute": "full"}, {}),
    (4, {"context": 4, "context_method": "ulysses", "zero": 1}, {}),
    (4, {"context": 4, **MIXED, "zero": 2}, {}),
    (8, {"context": 4, **MIXED, "data": 2, "zero": 3, "recompute": "full"}, {"num_kv_heads": 1}),
    (8, {"context": 4, **MIXED, "tensor": 2, "sequence": True, "zero": 0}, GPT2),
]


@pytest.mark.parametrize(("ranks", "parallel", "model"), MORE_TRAFFIC, ids=str)
def test_more_layouts_equal_the_formulas(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object]
) -> None:
    assert_equal(pool.run(measured_and_formula, tiny_config(parallel, model), world=ranks))


EXPERT_TRAFFIC = [
    *(
        (ranks, {"expert": expert, "zero": zero}, model, "fp32")
        for zero in (0, 1, 2, 3)
        for ranks, expert, model in ((2, 1, MOE), (4, 2, MOE), (4, 4, SIGMOID_MOE))
    ),
    (4, {"expert": 2, "zero": 2, "replicate": 2}, MOE, "fp32"),
    (4, {"expert": 2, "tensor": 2, "sequence": True}, MOE, "fp32"),
    (4, {"expert": 4, "context": 2}, MOE, "fp32"),
    (4, {"expert": 2, "pipeline": 2, "zero": 3}, MOE, "bf16"),
    (8, {"expert": 2, "pipeline": 2, "tensor": 2, "zero": 3, "recompute": "full"}, MOE, "fp32"),
    (4, {"expert": 2, "context": 2, **SELECTIVE, "recompute_layers": 2}, MOE, "fp32"),
    (8, {"expert": 2, "pipeline": 2, "schedule": "zbv", "context": 2, "zero": 2}, MOE, "bf16"),
    (4, {"expert": 4, "context": 4, **MIXED}, MOE, "bf16"),
    *(
        (4, {"expert": 2, "pipeline": 2, "schedule": schedule, "zero": zero, **more}, MOE, "fp32")
        for schedule, zero, more in (
            ("zero_bubble", 0, {}),
            ("zero_bubble", 1, {"recompute": "full"}),
            ("zbv", 3, {}),
            ("dualpipev", 2, {}),
        )
    ),
]


@pytest.mark.parametrize(("ranks", "parallel", "model", "precision"), EXPERT_TRAFFIC, ids=str)
def test_experts_equal_the_formulas(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    config = tiny_config(parallel, model, precision={"name": precision})
    assert_equal(pool.run(measured_and_formula, config, world=ranks), dropless=True)


def test_zero_stages_differ(pool: WorkerPool) -> None:
    """Each stage holds less than the one before it at some point of the step."""
    held = []
    for zero in (0, 1, 2, 3):
        measured: Any = pool.run(measured_and_formula, tiny_config({"zero": zero}), world=4)[0]["state bytes"][0]
        held.append(
            (measured.last_forward.parameters, measured.last_forward.gradients, measured.after_update.optimizer)
        )
    zero_0, zero_1, zero_2, zero_3 = held
    assert zero_1[2] * 3 < zero_0[2]
    assert zero_2[1] * 3 < zero_1[1]
    assert zero_3[0] * 3 < zero_2[0]
