"""DeepSpeed and Megatron-Core train the native engine's model, from its weights, and each takes over for each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.engines import on_engine
from dist_llm.train.trace import assemble
from tests.parallel.engines import (
    RATES,
    curve_of,
    curves,
    engine_config,
    evaluations,
    gaps,
    initial_state,
    journey,
    same,
    skipped_step,
    threads,
    without_host_adam,
)
from tests.parallel.tiny import GPT2, MOE, SIGMOID_MOE, tiny_config
from tests.tolerances import ENGINE_LOSS, ENGINE_NORM, LOW_PRECISION_LOSS

PLAIN_GPT2 = {**GPT2, "dropout": 0.0}
EXPERTS: dict[str, object] = {"moe": {**MOE["moe"], "bias_rate": 0.0}}  # type: ignore[dict-item]
LLAMA3 = {"rope": {"scaling": "llama3", "factor": 8.0, "original_max_seq_len": 8}}
SPLIT: dict[str, object] = {"tensor": 2, "sequence": True}
CHUNKS: dict[str, object] = {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}
Layout = tuple[int, dict[str, object], dict[str, object]]
DEEPSPEED: list[Layout] = [
    (2, {"zero": 1}, {}),
    (2, {"zero": 2}, MOE),
    (2, {"zero": 3, "recompute": "full"}, GPT2),
    (2, {"zero": 2, "context": 2}, {}),
    (4, {"zero": 1, **SPLIT}, MOE),
    (4, {"zero": 2, **SPLIT}, {**GPT2, "qk_norm": True}),
    (4, {"zero": 3, **SPLIT}, {"tie_embeddings": False}),
]
MEGATRON: list[Layout] = [
    (2, {"zero": 1}, PLAIN_GPT2),
    (2, {"pipeline": 2}, {"tie_embeddings": False}),
    (2, {**SPLIT, "recompute": "full"}, PLAIN_GPT2),
    (4, {**CHUNKS, "data": 2, "zero": 1}, {}),
    (4, {"data": 4, "expert": 2, "zero": 0}, EXPERTS),
    (8, {**SPLIT, "pipeline": 2, "data": 2, "zero": 1}, {}),
]
MORE_MEGATRON: list[Layout] = [
    (2, {"zero": 0}, LLAMA3),
    (2, {"tensor": 2}, {"qk_norm": True}),
    (2, {"context": 2}, {}),
    (4, {"pipeline": 2, "data": 2, "zero": 1}, {"vocab_size": 64}),
    (4, {**SPLIT, "context": 2, "expert": 2}, EXPERTS),
    (8, {**SPLIT, "pipeline": 2, "data": 2, "expert": 2, "zero": 1}, SIGMOID_MOE),
]


def _on_engine(name: str, *values: object, slow: bool = False) -> Any:
    """Return a case of an engine under a name that tells it."""
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(name, *values, marks=marks, id="-".join(map(str, (name, *values))))


@pytest.mark.parametrize(
    ("engine", "layout"),
    [
        *(_on_engine("deepspeed", layout) for layout in DEEPSPEED),
        *(_on_engine("megatron", layout) for layout in MEGATRON),
        *(_on_engine("megatron", layout, slow=True) for layout in MORE_MEGATRON),
    ],
)
def test_engines_train_alike(pool: WorkerPool, engine: str, layout: Layout) -> None:
    ranks, parallel, model = layout
    for native, ours in pool.run(curves, engine_config(engine, parallel, model), 20, world=ranks):
        assert same(ours, native), gaps(ours, native)


@pytest.mark.parametrize(
    ("engine", "layout"),
    [
        _on_engine("deepspeed", (3, {"zero": 1}, GPT2)),
        _on_engine("deepspeed", (3, {"zero": 3}, GPT2)),
        _on_engine("deepspeed", (4, {"zero": 2, **SPLIT}, GPT2)),
        _on_engine("megatron", (3, {"zero": 1}, PLAIN_GPT2)),
        _on_engine("megatron", (4, {**SPLIT, "pipeline": 2}, {})),
        _on_engine("megatron", (4, {**SPLIT, "data": 2, "expert": 2, "zero": 1}, EXPERTS)),
        _on_engine("megatron", (4, {"data": 4, "expert": 2, "zero": 0}, SIGMOID_MOE)),
    ],
)
def test_state_is_every_weight_once(pool: WorkerPool, engine: str, layout: Layout) -> None:
    ranks, parallel, model = layout
    config = tiny_config(parallel, model, {"global_batch": 12}, engine={"name": engine})
    alone = on_engine(tiny_config({}, model), "native")
    native = assemble(part for rank in pool.run(initial_state, alone, world=1) for part in rank)
    parts = [part for rank in pool.run(initial_state, config, world=ranks) for part in rank]
    ours = assemble(parts)
    assert ours.keys() == native.keys()
    assert sum(part[3].size for part in parts) == sum(whole.size for whole in native.values())
    for name, whole in native.items():
        np.testing.assert_array_equal(ours[name], whole, err_msg=name)


Leg = tuple[str, dict[str, object], int]
JOURNEYS: list[list[Leg]] = [
    [("native", {}, 10), ("deepspeed", {"zero": 2}, 20)],
    [("native", {}, 10), ("megatron", {"pipeline": 2, "zero": 1}, 20)],
    [("deepspeed", {"zero": 1, **SPLIT}, 10), ("native", {"zero": 1}, 20)],
    [("deepspeed", {"zero": 3}, 10), ("megatron", {**SPLIT}, 20)],
    [("megatron", {"zero": 1}, 10), ("native", {"zero": 3}, 20)],
    [("megatron", {"pipeline": 2}, 10), ("deepspeed", {"zero": 2}, 20)],
    [("deepspeed", {"zero": 1}, 7), ("deepspeed", {"zero": 3}, 14), ("native", {"zero": 3}, 20)],
    [("megatron", {"zero": 1}, 7), ("megatron", {**SPLIT, "zero": 0}, 14), ("native", {"zero": 3}, 20)],
]


@pytest.mark.parametrize("legs", JOURNEYS, ids=str)
def test_a_run_changes_engines(pool: WorkerPool, tmp_path: Path, legs: list[Leg]) -> None:
    """All six ordered pairs, and an engine that changes its own layout on the way: as 20 steps on the first."""
    careful = min((engine for engine, _, _ in legs if engine != "native"), key=RATES.__getitem__)
    model, optimizer = PLAIN_GPT2 if careful == "megatron" else GPT2, {"lr": RATES[careful]}
    own: dict[str, Any] = {"deep": False, "optimizer": optimizer}
    steps = [(engine_config(engine, parallel, model, **own), stop) for engine, parallel, stop in legs]
    whole = pool.run(curve_of, steps[0][0], 20, world=2)[0]
    changed = pool.run(journey, steps, tmp_path, world=2)[0]
    assert same(changed, whole), gaps(changed, whole)


def test_all_ordered_pairs_of_engines_are_changed() -> None:
    pairs = {(one[0], other[0]) for legs in JOURNEYS for one, other in itertools.pairwise(legs)}
    names = ("native", "deepspeed", "megatron")
    assert {(a, b) for a in names for b in names if a != b} <= pairs


ZEROS = [_on_engine(*case) for case in (("deepspeed", 1), ("deepspeed", 3), ("megatron", 0), ("megatron", 1))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("engine", "zero"), ZEROS)
def test_resume_is_bit_equal(pool: WorkerPool, tmp_path: Path, engine: str, zero: int, precision: str) -> None:
    config = engine_config(engine, {"zero": zero}, SIGMOID_MOE, precision={"name": precision})
    stopped = pool.run(journey, [(config, 3), (config, 6)], tmp_path, world=2)
    assert stopped == pool.run(curve_of, config, 6, world=2)


@pytest.mark.parametrize(("engine", "zero"), [("deepspeed", 1), ("deepspeed", 3), ("megatron", 0), ("megatron", 1)])
def test_an_engine_frees_its_groups(pool: WorkerPool, engine: str, zero: int) -> None:
    config = engine_config(engine, {"zero": zero}, SIGMOID_MOE)
    left = []
    for _ in range(2):
        pool.run(curve_of, config, 1, world=2)
        left.append(pool.run(threads, world=2))
    assert left[1] == left[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("engine", "zero"), [_on_engine("deepspeed", 2), *ZEROS])
def test_low_precision_trains_alike(pool: WorkerPool, engine: str, zero: int, precision: str) -> None:
    config = engine_config(engine, {"zero": zero}, precision={"name": precision})
    native, ours = pool.run(curves, config, 4, world=2)[0]
    assert np.abs(np.array(ours)[:, 0] - np.array(native)[:, 0]).max() <= LOW_PRECISION_LOSS
    norm = {"deepspeed": ENGINE_NORM, "megatron": 100 * ENGINE_NORM}[engine]
    assert ours[0][1] == pytest.approx(native[0][1], rel=norm)


@pytest.mark.parametrize(
    ("engine", "zero", "precision", "offload"),
    [
        *(_on_engine("deepspeed", zero, "fp32", "none") for zero in (1, 2, 3)),
        _on_engine("deepspeed", 1, "bf16", "none"),
        _on_engine("deepspeed", 2, "bf16", "optimizer"),
        _on_engine("megatron", 0, "fp32", "none"),
        _on_engine("megatron", 1, "fp32", "none"),
        _on_engine("megatron", 1, "bf16", "none"),
    ],
)
@pytest.mark.parametrize("model", [{}, SIGMOID_MOE], ids=["dense", "experts"])
def test_a_loss_that_is_not_finite_changes_nothing(
    pool: WorkerPool, engine: str, zero: int, precision: str, offload: str, model: dict[str, object]
) -> None:
    """Biases of routers are part of the model."""
    config = engine_config(engine, {"zero": zero, "offload": offload}, model, precision={"name": precision})
    for found in pool.run(without_host_adam, skipped_step, config, True, world=2):
        assert (found["skipped"], found["unchanged"]) == (True, True)
        assert (found["step"], found["optimizer_updates"], found["loss_scale"]) == (2, 3, 1.0)


@pytest.mark.parametrize(("engine", "zero"), ZEROS)
def test_an_overflow_of_fp16_is_skipped_and_halves_the_scale(pool: WorkerPool, engine: str, zero: int) -> None:
    config = engine_config(engine, {"zero": zero}, precision={"name": "fp16", "initial_loss_scale": 2.0**40})
    for found in pool.run(skipped_step, config, False, world=2):
        assert (found["skipped"], found["unchanged"], found["again"]) == (True, True, True)
        assert (found["step"], found["optimizer_updates"], found["loss_scale"]) == (2, 0, 2.0**38)


@pytest.mark.parametrize(
    ("engine", "parallel"),
    [
        _on_engine("deepspeed", {"zero": 2}),
        _on_engine("deepspeed", {"zero": 3}),
        _on_engine("megatron", {"zero": 1}),
        _on_engine("megatron", {"pipeline": 2}),
    ],
)
def test_evaluation_is_alike(pool: WorkerPool, engine: str, parallel: dict[str, object]) -> None:
    """Sums of loss over a batch, before a step and after it."""
    config = engine_config(engine, parallel, GPT2 if engine == "deepspeed" else PLAIN_GPT2)
    first, second, *ours = pool.run(evaluations, config, world=2)[0]
    tokens = config.data.global_batch * config.data.seq_len
    assert [counted for _, counted in ours] == [first[1], second[1]] == [tokens, tokens]
    assert [loss for loss, _ in ours] == pytest.approx([first[0], second[0]], rel=ENGINE_LOSS)
