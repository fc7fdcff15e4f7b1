"""Megatron-Core trains the same model as the native engine, from the same weights, and takes over its checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.trace import assemble
from tests.parallel.engines import curve_of, curves, gaps, held, initial_state, journey, on, running, same
from tests.parallel.tiny import GPT2, MOE, SIGMOID_MOE, Curve, random_batch, tiny_config
from tests.tolerances import ENGINE_LOSS, ENGINE_NORM, LOW_PRECISION_LOSS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="the extra `megatron` is not installed"
)
BOTH = ("native", "megatron")
SPLIT: dict[str, object] = {"tensor": 2, "sequence": True}
PLAIN_GPT2 = {**GPT2, "dropout": 0.0}
EXPERTS: dict[str, object] = {"moe": {**MOE["moe"], "bias_rate": 0.0}}  # type: ignore[dict-item]
CHUNKS: dict[str, object] = {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}
LLAMA3 = {"rope": {"scaling": "llama3", "factor": 8.0, "original_max_seq_len": 8}}
Layout = tuple[int, dict[str, object], dict[str, object]]
LAYOUTS: list[Layout] = [
    (2, {"zero": 1}, PLAIN_GPT2),
    (2, {"pipeline": 2}, {"tie_embeddings": False}),
    (2, {**SPLIT, "recompute": "full"}, PLAIN_GPT2),
    (4, {**CHUNKS, "data": 2, "zero": 1}, {}),
    (4, {"data": 4, "expert": 2, "zero": 0}, EXPERTS),
    (8, {**SPLIT, "pipeline": 2, "data": 2, "zero": 1}, {}),
]
MORE: list[Layout] = [
    (2, {"zero": 0}, LLAMA3),
    (2, {"tensor": 2}, {"qk_norm": True}),
    (2, {"context": 2}, {}),
    (4, {"pipeline": 2, "data": 2, "zero": 1}, {"vocab_size": 64}),
    (4, {**SPLIT, "context": 2, "expert": 2}, EXPERTS),
    (8, {**SPLIT, "pipeline": 2, "data": 2, "expert": 2, "zero": 1}, SIGMOID_MOE),
]


def _config(
    parallel: dict[str, object], model: dict[str, object] | None = None, engine: str = "megatron", **sections: Any
) -> RunConfig:
    run = {"run": {"steps": 20, "seed": 1}, "engine": {"name": engine}, "optimizer": {"lr": 1e-3}}
    return tiny_config(parallel, model, {"global_batch": 16, "microbatch": 2}, **{**run, **sections})


def _slow(layout: Layout) -> Any:
    return pytest.param(layout, marks=pytest.mark.slow)


@pytest.mark.parametrize("layout", [*LAYOUTS, *map(_slow, MORE)], ids=str)
def test_engines_train_alike(pool: WorkerPool, layout: Layout) -> None:
    ranks, parallel, model = layout
    for native, ours in pool.run(curves, _config(parallel, model), 20, BOTH, world=ranks):
        assert same(ours, native), gaps(ours, native)


def test_documents_keep_to_themselves(pool: WorkerPool) -> None:
    config = _config({**SPLIT, "zero": 1})
    masked = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": True})})
    native, ours = pool.run(curves, masked, 3, BOTH, world=2)[0]
    assert same(ours, native), gaps(ours, native)


def broken_curve(config: RunConfig, fault: str, steps: int) -> Curve:
    """Train with a fault in the engine."""
    from dist_llm.engine import megatron

    finish = megatron.finalize_model_grads

    def halved(chunks: Any, tokens: torch.Tensor, **more: Any) -> None:
        finish(chunks, 2 * tokens, **more)

    faults: dict[str, tuple[Any, str, Any]] = {
        "norms count one rank's part": (megatron, "is_split", lambda name: False),
        "gradients are halved": (megatron, "finalize_model_grads", halved),
        "gradients are of a microbatch": (megatron.MegatronEngine, "_scaled", lambda self, loss: loss),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*faults[fault])
        return curve_of(config, steps)


@pytest.mark.parametrize(
    "fault", ["norms count one rank's part", "gradients are halved", "gradients are of a microbatch"]
)
def test_a_fault_is_found(pool: WorkerPool, fault: str) -> None:
    config = _config({**SPLIT, "data": 2, "zero": 1})
    native = pool.run(curve_of, on(config, "native"), 3, world=4)[0]
    assert not same(pool.run(broken_curve, config, fault, 3, world=4)[0], native)


STATES: list[Layout] = [
    (3, {"zero": 1}, PLAIN_GPT2),
    (4, {**SPLIT, "pipeline": 2}, {}),
    (4, {**SPLIT, "data": 2, "expert": 2, "zero": 1}, EXPERTS),
    (4, {"data": 4, "expert": 2, "zero": 0}, SIGMOID_MOE),
]


@pytest.mark.parametrize(("ranks", "parallel", "model"), STATES, ids=str)
def test_state_is_every_weight_once(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object]
) -> None:
    config = tiny_config(parallel, model, {"global_batch": 12}, engine={"name": "megatron"})
    alone = on(tiny_config({}, model), "native")
    native = assemble(part for rank in pool.run(initial_state, alone, world=1) for part in rank)
    parts = [part for rank in pool.run(initial_state, config, world=ranks) for part in rank]
    ours = assemble(parts)
    assert ours.keys() == native.keys()
    assert sum(part[3].size for part in parts) == sum(whole.size for whole in native.values())
    for name, whole in native.items():
        np.testing.assert_array_equal(ours[name], whole, err_msg=name)


JOURNEYS: list[list[tuple[str, dict[str, object], int]]] = [
    [("native", {}, 10), ("megatron", {"pipeline": 2, "zero": 1}, 20)],
    [("megatron", {"zero": 1}, 7), ("megatron", {**SPLIT, "zero": 0}, 14), ("native", {"zero": 3}, 20)],
    [("megatron", {"zero": 1}, 10), ("deepspeed", {"zero": 2}, 20)],
    [("deepspeed", {"zero": 3}, 10), ("megatron", {**SPLIT}, 20)],
]


@pytest.mark.parametrize("legs", JOURNEYS, ids=str)
def test_a_run_changes_engines(
    pool: WorkerPool, tmp_path: Path, legs: list[tuple[str, dict[str, object], int]]
) -> None:
    whole = pool.run(curve_of, _config({}, PLAIN_GPT2, "native"), 20, world=2)[0]
    steps = [(_config(parallel, PLAIN_GPT2, engine), stop) for engine, parallel, stop in legs]
    changed = pool.run(journey, steps, tmp_path, world=2)[0]
    assert same(changed, whole), gaps(changed, whole)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_equal(pool: WorkerPool, tmp_path: Path, zero: int, precision: str) -> None:
    config = _config({"zero": zero}, SIGMOID_MOE, precision={"name": precision})
    stopped = pool.run(journey, [(config, 3), (config, 6)], tmp_path, world=2)
    assert stopped == pool.run(curve_of, config, 6, world=2)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_alike(pool: WorkerPool, zero: int, precision: str) -> None:
    config = _config({"zero": zero}, precision={"name": precision})
    native, ours = pool.run(curves, config, 4, BOTH, world=2)[0]
    assert np.abs(np.array(ours)[:, 0] - np.array(native)[:, 0]).max() <= LOW_PRECISION_LOSS
    assert ours[0][1] == pytest.approx(native[0][1], rel=100 * ENGINE_NORM)


def skipped_step(config: RunConfig, ruin: bool) -> dict[str, Any]:
    """Run a step that cannot be taken; ruin: a weight is not finite. Return what became of it."""
    with running(config) as engine:
        state = engine.state()
        for shard in state.tensors if ruin else ():
            if shard.name == "model.layers.0.mlp_norm.weight":
                shard.data.fill_(torch.inf)
        engine.restore(dict(state.facts))
        before = held(engine)
        result = engine.train_step(random_batch(config, engine.data_slice, 0))
        unchanged = all(np.array_equal(a[3], b[3]) for a, b in zip(before, held(engine), strict=True))
        return {**engine.state().facts, "skipped": result.skipped, "unchanged": unchanged}


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (1, "fp16"), (0, "fp16")])
def test_a_step_that_is_not_finite_changes_nothing(pool: WorkerPool, zero: int, precision: str) -> None:
    ruin = precision != "fp16"
    config = _config({"zero": zero}, precision={"name": precision, "initial_loss_scale": 2.0**40})
    for found in pool.run(skipped_step, config, ruin, world=2):
        assert found["skipped"]
        assert found["unchanged"]
        assert (found["step"], found["optimizer_updates"]) == (1, 0)
        assert found["loss_scale"] == (1.0 if ruin else 2.0**39)


def evaluations(config: RunConfig) -> list[tuple[float, int]]:
    """Return the loss sums of a batch on both engines, before a step and after it."""
    found = []
    for name in BOTH:
        with running(on(config, name)) as engine:
            for step in range(2):
                loss = engine.eval_step(random_batch(config, engine.data_slice, 7))
                found.append((loss.loss, loss.tokens))
                engine.train_step(random_batch(config, engine.data_slice, step))
    return found


@pytest.mark.parametrize("parallel", [{"zero": 1}, {"pipeline": 2}], ids=str)
def test_evaluation_is_alike(pool: WorkerPool, parallel: dict[str, object]) -> None:
    first, second, *ours = pool.run(evaluations, _config(parallel, PLAIN_GPT2), world=2)[0]
    assert [tokens for _, tokens in ours] == [first[1], second[1]]
    assert [loss for loss, _ in ours] == pytest.approx([first[0], second[0]], rel=ENGINE_LOSS)
