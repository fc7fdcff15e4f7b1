"""Every layout trains the same model as one process; broken collectives are found."""

from __future__ import annotations

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.faults import FAULTS, Fault, broken_curve
from tests.parallel.tiny import GPT2, MOE, SIGMOID_MOE, build, curve, largest_gap, random_batch, tiny_config
from tests.tolerances import FP64_FEW_STEPS, LOW_PRECISION_LOSS, VISIBLE, VISIBLE_MASK

CHEAP: dict[str, object] = {"recompute": "selective", "recompute_operators": ["core_attn", "norm", "activation"]}
UNTIED: dict[str, object] = {"tie_embeddings": False, "qk_norm": True}
MODELS: dict[str, dict[str, object]] = {"llama": {}, "gpt2": GPT2, "untied": UNTIED}
MIXED: dict[str, object] = {"context": 4, "context_method": "mixed", "context_heads": 2}
LAYOUTS: list[tuple[int, dict[str, object]]] = [
    (2, {"tensor": 2, "zero": 0}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"zero": 0}),
    (4, {"zero": 1}),
    (4, {"zero": 2}),
    (4, {"zero": 3}),
    (4, {"zero": 2, "replicate": 2}),
    (2, {"pipeline": 2, "schedule": "gpipe"}),
    (4, {"pipeline": 2, "zero": 2}),
    (4, {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved", "zero": 3}),
    (8, {"tensor": 2, "sequence": True, "pipeline": 2, "zero": 1}),
    (8, {"tensor": 2, "sequence": True, "pipeline": 2, "zero": 3, "recompute": "full"}),
    (2, {"tensor": 2, **CHEAP}),
    (4, {"pipeline": 2, "schedule": "zbv", "zero": 3, **CHEAP, "recompute_layers": 1}),
    (2, {"context": 2, **CHEAP}),
    (2, {"pipeline": 2, "schedule": "zero_bubble", "zero": 0}),
    (4, {"pipeline": 2, "virtual_pipeline": 2, "schedule": "zero_bubble", "zero": 3}),
    (4, {"pipeline": 2, "schedule": "zbv", "zero": 3, "recompute": "full"}),
    (8, {"pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence": True, "zero": 2}),
    (4, {"pipeline": 2, "schedule": "dualpipev", "zero": 1}),
    (2, {"context": 2, "zero": 0}),
    (2, {"context": 2, "context_method": "ulysses", "recompute": "full"}),
    (4, {"context": 4, "zero": 3}),
    (4, {"context": 2, "data": 2, "context_method": "ulysses", "zero": 2}),
    (8, {"context": 2, "tensor": 2, "sequence": True, "pipeline": 2, "zero": 1}),
    (4, {**MIXED, "zero": 3, "recompute": "full"}),
    (8, {**MIXED, "tensor": 2, "sequence": True, "zero": 1}),
    (8, {**MIXED, "pipeline": 2, "schedule": "zbv", "zero": 2}),
    (4, {"context": 4, "context_method": "ulysses", "zero": 0}),
]
EXPERT_LAYOUTS: list[tuple[int, dict[str, object]]] = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"expert": 2, "zero": 0}),
    (4, {"expert": 2, "zero": 2}),
    (4, {"expert": 4, "zero": 3}),
    (4, {"expert": 2, "zero": 2, "replicate": 2}),
    (4, {"expert": 4, "context": 2}),
    (4, {"expert": 4, **MIXED}),
    (8, {"expert": 2, "tensor": 2, "sequence": True, "pipeline": 2, "zero": 3, "recompute": "full"}),
    (4, {"expert": 2, "tensor": 2, "sequence": True, "recompute": "selective", "recompute_operators": ["norm", "mlp"]}),
    (8, {"expert": 2, "context": 2, "pipeline": 2, "schedule": "zbv", "zero": 2}),
    (4, {"expert": 2, "pipeline": 2, "schedule": "dualpipev", "zero": 3}),
    (4, {"expert": 2, "pipeline": 2, "virtual_pipeline": 2, "schedule": "zero_bubble", "zero": 1}),
]
FP64: dict[str, object] = {"name": "fp64"}


@pytest.mark.parametrize(
    ("name", "steps"), [("llama", 3), *(pytest.param(name, 5, marks=pytest.mark.slow) for name in MODELS)]
)
def test_layouts_agree_in_fp64(pool: WorkerPool, name: str, steps: int) -> None:
    def config(parallel: dict[str, object]) -> RunConfig:
        return tiny_config(parallel, MODELS[name], precision=FP64)

    one = pool.run(curve, config({}), steps, world=1)[0]
    gaps = {}
    for ranks, parallel in LAYOUTS:
        for rank, ours in enumerate(pool.run(curve, config(parallel), steps, world=ranks)):
            gaps[f"{parallel} rank {rank}"] = largest_gap(ours, one)
    assert max(gaps.values()) <= FP64_FEW_STEPS, {at: gap for at, gap in gaps.items() if gap > FP64_FEW_STEPS}


@pytest.mark.parametrize(
    ("model", "steps"),
    [(MOE, 3), *(pytest.param(model, 5, marks=pytest.mark.slow) for model in (MOE, SIGMOID_MOE))],
    ids=["softmax", "softmax, longer", "sigmoid"],
)
def test_experts_agree_in_fp64(pool: WorkerPool, model: dict[str, object], steps: int) -> None:
    one = pool.run(curve, tiny_config({}, model, precision=FP64), steps, world=1)[0]
    gaps = {}
    for ranks, parallel in EXPERT_LAYOUTS:
        for rank, ours in enumerate(pool.run(curve, tiny_config(parallel, model, precision=FP64), steps, world=ranks)):
            gaps[f"{parallel} rank {rank}"] = largest_gap(ours, one)
    assert max(gaps.values()) <= FP64_FEW_STEPS, {at: gap for at, gap in gaps.items() if gap > FP64_FEW_STEPS}


def test_documents_are_masked_alike(pool: WorkerPool) -> None:
    data: dict[str, object] = {"document_mask": True}
    masked = pool.run(curve, tiny_config({}, None, data, precision=FP64), world=1)[0]
    plain = pool.run(curve, tiny_config({}, precision=FP64), world=1)[0]
    assert largest_gap(masked, plain) > VISIBLE_MASK
    splits: list[dict[str, object]] = [
        {"tensor": 2, "sequence": True, "pipeline": 2},
        {"context": 2, "tensor": 2, "sequence": True},
        {"context": 2, "context_method": "ulysses", "pipeline": 2},
        {"context": 4},
        MIXED,
    ]
    for split in splits:
        ours = pool.run(curve, tiny_config(split, None, data, precision=FP64), world=4)[3]
        assert largest_gap(ours, masked) <= FP64_FEW_STEPS, split


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_low_precision_is_close_and_learns(pool: WorkerPool, name: str) -> None:
    one = pool.run(curve, tiny_config(precision={"name": "fp32"}), world=1)[0]
    layouts: tuple[tuple[int, dict[str, object]], ...] = ((2, {"zero": 2}), (2, {"context": 2}), (4, MIXED))
    for ranks, parallel in layouts:
        low = pool.run(curve, tiny_config(parallel, precision={"name": name}), world=ranks)[0]
        assert all(abs(a[0] - b[0]) < LOW_PRECISION_LOSS for a, b in zip(low, one, strict=True)), parallel


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name} {fault.parallel}")
def test_a_fault_is_found(pool: WorkerPool, fault: Fault) -> None:
    data: dict[str, object] = {"document_mask": fault.documents}
    one = pool.run(curve, tiny_config({}, fault.model, data, precision=FP64), world=1)[0]
    config = tiny_config(fault.parallel, fault.model, data, precision=FP64)
    broken = pool.run(broken_curve, config, fault.name, world=fault.ranks)[0]
    assert largest_gap(broken, one) > VISIBLE


def test_padding_is_never_predicted(pool: WorkerPool) -> None:
    """Rows past the vocabulary stay zero, and tokens of every rank's share are learned."""
    for zero_rows, vocab_rows in pool.run(padding_rows, tiny_config({"tensor": 2}, {"vocab_size": 101}), world=2):
        assert zero_rows == 0.0
        assert vocab_rows in (56, 45)


def padding_rows(config: RunConfig) -> tuple[float, int]:
    """Train; return the largest weight in the padding of the token table and this rank's number of real rows."""
    engine = build(config)
    for step in range(3):
        engine.train_step(random_batch(config, engine.data_slice, step))
    table = next(shard for shard in engine.shards if shard.name == "embed.tokens.weight")
    padding = table.tensor[table.extent[0] :]
    return float(padding.abs().max()) if padding.numel() else 0.0, table.extent[0]


def eval_losses(config: RunConfig) -> list[float]:
    """Return the loss of an evaluation before, between and after training steps."""
    engine = build(config)
    losses = []
    for step in range(3):
        evaluated = engine.eval_step(random_batch(config, engine.data_slice, 100))
        losses.append(evaluated.loss / evaluated.tokens)
        engine.train_step(random_batch(config, engine.data_slice, step))
    return losses


def test_evaluation_agrees_and_changes_nothing(pool: WorkerPool) -> None:
    one = pool.run(eval_losses, tiny_config({}, GPT2, precision=FP64), world=1)[0]
    interleaved = {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}
    layouts = (
        (4, {"zero": 3}),
        (4, {"pipeline": 2, "zero": 2}),
        (2, {"tensor": 2, "sequence": True}),
        (2, interleaved),
        (4, {"context": 2, "pipeline": 2}),
        (4, MIXED),
    )
    for ranks, parallel in layouts:
        for ours in pool.run(eval_losses, tiny_config(parallel, GPT2, precision=FP64), world=ranks):
            assert ours == pytest.approx(one, rel=FP64_FEW_STEPS)
