"""Compiled blocks train the same model on every layout, and are compiled once for all layers and steps."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dist_llm.accounting.memory import place_of
from dist_llm.accounting.traffic import Shapes, step_traffic
from dist_llm.config.run import RunConfig
from dist_llm.errors import EngineUnavailable
from dist_llm.parallel.compile import require_compiler
from dist_llm.parallel.recompute import _Call
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.tiny import GPT2, MOE, Curve, build, curve, largest_gap, random_batch, tiny_config
from tests.tolerances import FP64_FEW_STEPS

TRACED: dict[str, object] = {"compile": True, "compile_backend": "aot_eager"}
CHEAP: dict[str, object] = {"recompute": "selective", "recompute_operators": ["core_attn", "norm", "activation"]}
LAYOUTS: list[tuple[int, dict[str, object], dict[str, object]]] = [
    (2, {"tensor": 2, "zero": 0}, GPT2),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}, {}),
    (2, {"zero": 3, **CHEAP}, {}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2, "zero": 1, **CHEAP}, {}),
    (4, {"pipeline": 2, "schedule": "zbv", "zero": 2}, {}),
    (2, {"context": 2, "recompute": "full"}, {}),
    (2, {"context": 2, "context_method": "ulysses"}, GPT2),
    (4, {"expert": 2, "zero": 2}, MOE),
    (2, {"context": 2, **CHEAP}, {}),
    (4, {"context": 4, "context_method": "mixed", "context_heads": 2}, {}),
    (2, {"expert": 2, **CHEAP}, MOE),
]


def fresh(job: Any, *args: Any) -> Any:
    """Run a job of the pool with nothing compiled before it, and leave nothing compiled."""
    torch._dynamo.reset()
    counters.clear()
    try:
        return job(*args)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel", "model"), LAYOUTS, ids=str)
def test_compiled_layouts_agree_in_fp64(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object]
) -> None:
    precision = {"name": "fp64"}
    one = pool.run(curve, tiny_config({}, model, precision=precision), 3, world=1)[0]
    config = tiny_config({**parallel, **TRACED}, model, precision=precision)
    for ours in pool.run(fresh, curve, config, 3, world=ranks):
        assert largest_gap(ours, one) <= FP64_FEW_STEPS


def work_of_compiler(config: RunConfig) -> tuple[dict[str, int], dict[str, int], Curve]:
    """Train and evaluate; return the compiler's counts after one step and after all, and the losses."""
    engine = build(config)
    seen, losses = [], []
    for step in range(3):
        result = engine.train_step(random_batch(config, engine.data_slice, step))
        losses.append((result.loss, result.grad_norm))
        breaks = sum(counters["graph_break"].values())
        seen.append({"graphs": counters["stats"]["unique_graphs"], "breaks": breaks})
    return seen[0], seen[-1], losses


@pytest.mark.parametrize("model", [{}, GPT2], ids=["llama", "gpt2"])
def test_a_block_is_compiled_once_and_whole(pool: WorkerPool, model: dict[str, object]) -> None:
    one = pool.run(curve, tiny_config({}, model), 3, world=1)[0]
    first, last, losses = pool.run(fresh, work_of_compiler, tiny_config(TRACED, model), world=1)[0]
    assert first == last == {"graphs": 1, "breaks": 0}
    assert largest_gap(losses, one) <= 1e-5


def test_sequence_parallel_blocks_are_whole(pool: WorkerPool) -> None:
    config = tiny_config({"tensor": 2, "sequence": True, **TRACED})
    for first, last, _ in pool.run(fresh, work_of_compiler, config, world=2):
        assert first == last == {"graphs": 1, "breaks": 0}


def issued_and_formula(config: RunConfig) -> dict[str, tuple[int, int]]:
    """Run two steps; return how often the second gathered and scattered, by torch's profiler, and the formula.

    Not the ledger: it is a dispatch mode, under which torch runs blocks as they are written.
    """
    engine = build(config)
    engine.train_step(random_batch(config, engine.data_slice, 0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.train_step(random_batch(config, engine.data_slice, 1))
    seen = {event.key: event.count for event in profile.key_averages()}
    place = place_of(config.parallel, 1, 0, 0)
    traffic = step_traffic(Shapes(config.model, config.parallel, config.precision, config.data, place, 1))
    names = {
        "all_gather": ("c10d::_allgather_base_", "_c10d_functional::all_gather_into_tensor"),
        "reduce_scatter": ("dist_llm_c10d::reduce_scatter", "_c10d_functional::reduce_scatter_tensor"),
    }
    return {kind: (sum(seen.get(name, 0) for name in both), traffic.counts["tp", kind]) for kind, both in names.items()}


OTHERS = "torch 2.11 gathers less and sums more in compiled blocks (docs/memory-and-speed.md)"


@pytest.mark.parametrize(
    ("parallel", "model", "precision"),
    [
        pytest.param({}, {}, "fp32", marks=pytest.mark.xfail(torch.__version__ < "2.12", reason=OTHERS, strict=True)),
        pytest.param({}, MOE, "fp32", marks=pytest.mark.slow),
        pytest.param({"fused_accumulation": True, "zero": 1}, {}, "bf16", marks=pytest.mark.slow),
    ],
    ids=["dense", "experts", "fused accumulation"],
)
def test_full_recompute_of_compiled_blocks_is_counted(
    pool: WorkerPool, parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    layout = {"tensor": 2, "sequence": True, "recompute": "full", **TRACED, **parallel}
    config = tiny_config(layout, model, precision={"name": precision})
    for counts in pool.run(fresh, issued_and_formula, config, world=2):
        for kind, (measured, formula) in counts.items():
            assert measured == formula, kind


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    with pytest.raises(EngineUnavailable, match="C\\+\\+ compiler"):
        require_compiler("inductor", torch.device("cpu"))
    require_compiler("aot_eager", torch.device("cpu"))


def calls_left(config: RunConfig) -> int:
    """Train two steps; return how many calls of operators that gave up their results are still there."""
    engine = build(config)
    for step in range(2):
        engine.train_step(random_batch(config, engine.data_slice, step))
    return sum(isinstance(thing, _Call) for thing in gc.get_objects())


@pytest.mark.slow
def test_what_a_compiled_block_leaves_out_is_let_go(pool: WorkerPool) -> None:
    """Layers of experts run uncompiled in compiled blocks, where nobody looks at what operators give up."""
    assert pool.run(fresh, calls_left, tiny_config({**CHEAP, **TRACED}, MOE), world=1) == [0]


@pytest.mark.slow
def test_inductor_agrees(pool: WorkerPool) -> None:
    try:
        require_compiler("inductor", torch.device("cpu"))
    except EngineUnavailable as reason:
        pytest.skip(str(reason))
    one = pool.run(curve, tiny_config(), 3, world=1)[0]
    ours = pool.run(fresh, curve, tiny_config({"compile": True}), 3, world=1)[0]
    assert largest_gap(ours, one) <= 1e-5
