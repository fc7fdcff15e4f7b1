"""DeepSpeed trains the same model as the native engine, from the same weights, and takes over its checkpoints."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_llm.config.run import RunConfig
from dist_llm.errors import EngineUnavailable, ExitCode
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.trace import assemble
from tests.parallel.engines import (
    curve_of,
    curves,
    gaps,
    held,
    initial_state,
    journey,
    on,
    running,
    same,
)
from tests.parallel.tiny import GPT2, MOE, Curve, random_batch, tiny_config
from tests.tolerances import ENGINE_LOSS, ENGINE_NORM, LOW_PRECISION_LOSS

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed` is not installed"
)
BOTH = ("native", "deepspeed")
SPLIT: dict[str, object] = {"tensor": 2, "sequence": True}
LAYOUTS: list[tuple[int, dict[str, object], dict[str, object]]] = [
    (2, {"zero": 1}, {}),
    (2, {"zero": 2}, MOE),
    (2, {"zero": 3, "recompute": "full"}, GPT2),
    (2, {"zero": 2, "context": 2}, {}),
    (4, {"zero": 1, **SPLIT}, MOE),
    (4, {"zero": 2, **SPLIT}, {**GPT2, "qk_norm": True}),
    (4, {"zero": 3, **SPLIT}, {"tie_embeddings": False}),
]


def _config(
    parallel: dict[str, object], model: dict[str, object] | None = None, engine: str = "deepspeed", **sections: Any
) -> RunConfig:
    sections = {"run": {"steps": 20, "seed": 1}, "engine": {"name": engine}, **sections}
    return tiny_config(parallel, model, {"microbatch": 2}, **sections)


@needs_deepspeed
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_engines_train_alike(pool: WorkerPool, layout: tuple[int, dict[str, object], dict[str, object]]) -> None:
    ranks, parallel, model = layout
    for native, ours in pool.run(curves, _config(parallel, model), 20, BOTH, world=ranks):
        assert same(ours, native), gaps(ours, native)


def broken_curve(config: RunConfig, fault: str, steps: int) -> Curve:
    """Train with a fault in the engine."""
    from dist_llm.engine import deepspeed

    def mark(split: bool) -> Any:
        def marks(shards: Any, tp: Any) -> None:
            for shard in shards:
                shard.parameter.tensor_model_parallel = shard.split or split
                if split and shard.partial:
                    shard.parameter.register_hook(lambda gradient: _summed(gradient, tp))

        return marks

    def _summed(gradient: torch.Tensor, tp: Any) -> torch.Tensor:
        torch.distributed.all_reduce(gradient, group=tp.group)
        return gradient

    def double(self: Any, divisor: float) -> None:
        self._zero.custom_loss_scaler, self._zero.external_loss_scale = True, 2 * divisor if divisor != 1 else 1.0

    faults = {
        "partial sums are forgotten": (deepspeed, "_mark_parts", mark(False)),
        "replicas count twice": (deepspeed, "_mark_parts", mark(True)),
        "the divisor is twice too large": (deepspeed.DeepSpeedEngine, "_set_divisor", double),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*faults[fault])
        return curve_of(config, steps)


@needs_deepspeed
@pytest.mark.parametrize(
    "fault", ["partial sums are forgotten", "replicas count twice", "the divisor is twice too large"]
)
def test_a_fault_is_found(pool: WorkerPool, fault: str) -> None:
    config = _config({"zero": 2, **SPLIT})
    native = pool.run(curve_of, on(config, "native"), 3, world=4)[0]
    assert not same(pool.run(broken_curve, config, fault, 3, world=4)[0], native)


@needs_deepspeed
@pytest.mark.parametrize(
    ("ranks", "parallel"), [(3, {"zero": 1}), (3, {"zero": 3}), (4, {"zero": 2, **SPLIT})], ids=str
)
def test_state_is_every_weight_once(pool: WorkerPool, ranks: int, parallel: dict[str, object]) -> None:
    config = tiny_config(parallel, GPT2, {"global_batch": 12}, engine={"name": "deepspeed"})
    native = assemble(r for rank in pool.run(initial_state, on(tiny_config({}, GPT2), "native"), world=1) for r in rank)
    parts = [r for rank in pool.run(initial_state, config, world=ranks) for r in rank]
    ours = assemble(parts)
    assert ours.keys() == native.keys()
    assert sum(part[3].size for part in parts) == sum(whole.size for whole in native.values())
    for name, whole in native.items():
        np.testing.assert_array_equal(ours[name], whole, err_msg=name)


JOURNEYS: list[list[tuple[str, dict[str, object], int]]] = [
    [("native", {}, 10), ("deepspeed", {"zero": 2}, 20)],
    [("deepspeed", {"zero": 1}, 7), ("deepspeed", {"zero": 3}, 14), ("native", {"zero": 3}, 20)],
    [("deepspeed", {"zero": 1, **SPLIT, "data": 1}, 10), ("native", {"zero": 1}, 20)],
]


@needs_deepspeed
@pytest.mark.parametrize("legs", JOURNEYS, ids=str)
def test_a_run_changes_engines(
    pool: WorkerPool, tmp_path: Path, legs: list[tuple[str, dict[str, object], int]]
) -> None:
    whole = pool.run(curve_of, _config({}, GPT2, "native"), 20, world=2)[0]
    steps = [(_config(parallel, GPT2, engine), stop) for engine, parallel, stop in legs]
    changed = pool.run(journey, steps, tmp_path, world=2)[0]
    assert same(changed, whole), gaps(changed, whole)


@needs_deepspeed
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_equal(pool: WorkerPool, tmp_path: Path, zero: int, precision: str) -> None:
    config = _config({"zero": zero}, precision={"name": precision})
    stopped = pool.run(journey, [(config, 3), (config, 6)], tmp_path, world=2)
    assert stopped == pool.run(curve_of, config, 6, world=2)


@needs_deepspeed
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_alike(pool: WorkerPool, zero: int, precision: str) -> None:
    config = _config({"zero": zero}, precision={"name": precision})
    native, ours = pool.run(curves, config, 4, BOTH, world=2)[0]
    assert np.abs(np.array(ours)[:, 0] - np.array(native)[:, 0]).max() <= LOW_PRECISION_LOSS
    assert ours[0][1] == pytest.approx(native[0][1], rel=ENGINE_NORM)


def skipped_step(config: RunConfig, ruin: bool) -> dict[str, Any]:
    """Run a step that cannot be taken, and one more; ruin: a weight is not finite. Return what became of it."""
    with running(config) as engine:
        state = engine.state()
        if ruin:
            for shard in state.tensors:
                if shard.name == "model.layers.0.mlp_norm.weight":
                    shard.data.fill_(torch.inf)
            engine.restore({**state.facts, "optimizer_updates": 3})
        before = held(engine)
        result = engine.train_step(random_batch(config, engine.data_slice, 0))
        after = held(engine)
        same = all(np.array_equal(a[3], b[3]) for a, b in zip(before, after, strict=True))
        again = engine.train_step(random_batch(config, engine.data_slice, 1))
        facts = dict(engine.state().facts)
        return {
            "skipped": result.skipped,
            "same": same,
            "again": again.skipped,
            "facts": facts,
            "norm": result.grad_norm,
        }


@needs_deepspeed
@pytest.mark.parametrize(
    ("zero", "precision", "offload"),
    [(1, "fp32", "none"), (2, "fp32", "none"), (3, "fp32", "none"), (1, "bf16", "none"), (2, "bf16", "optimizer")],
)
def test_a_loss_that_is_not_finite_changes_nothing(pool: WorkerPool, zero: int, precision: str, offload: str) -> None:
    config = _config({"zero": zero, "offload": offload}, precision={"name": precision})
    for found in pool.run(without_compiler, skipped_step, config, True, world=2):
        assert found["skipped"]
        assert found["same"]
        assert found["facts"]["step"] == 2
        assert found["facts"]["optimizer_updates"] == 3


@needs_deepspeed
@pytest.mark.parametrize("zero", [1, 3])
def test_an_overflow_of_fp16_is_skipped_and_halves_the_scale(pool: WorkerPool, zero: int) -> None:
    config = _config({"zero": zero}, precision={"name": "fp16", "initial_loss_scale": 2.0**40})
    for found in pool.run(skipped_step, config, False, world=2):
        assert found["skipped"]
        assert found["same"]
        assert found["again"]
        assert found["facts"]["loss_scale"] == 2.0**38
        assert found["facts"]["optimizer_updates"] == 0


def without_compiler(job: Any, *args: Any) -> Any:
    """Run a job where DeepSpeed's host Adam cannot be built, which takes a minute where it can."""
    from dist_llm.engine import deepspeed_library

    def load() -> None:
        raise RuntimeError("no compiler")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_library, "_host_adam", load)
        return job(*args)


OFFLOADS = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]


@needs_deepspeed
@pytest.mark.parametrize(("zero", "offload"), OFFLOADS)
def test_offload_trains_alike(pool: WorkerPool, zero: int, offload: str) -> None:
    config = _config({"zero": zero, "offload": offload})
    native, ours = pool.run(without_compiler, curves, config, 5, BOTH, world=2)[0]
    assert same(ours, native), gaps(ours, native)


@needs_deepspeed
@pytest.mark.slow
def test_the_host_adam_of_deepspeed_trains_alike_and_resumes(pool: WorkerPool, tmp_path: Path) -> None:
    config = _config({"zero": 3, "offload": "parameters"})
    native, ours = pool.run(curves, config, 8, BOTH, world=2)[0]
    assert same(ours, native), gaps(ours, native)
    assert pool.run(journey, [(config, 5), (config, 8)], tmp_path, world=2)[0] == ours


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_files_train_alike_and_resume(pool: WorkerPool, tmp_path: Path, offload: str) -> None:
    """ZeRO-Infinity on a model large enough for its files to be used (1 MiB a tensor)."""
    wide: dict[str, object] = {"hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 3000}
    there = {"name": "deepspeed", "offload_to": "nvme", "nvme_path": str(tmp_path / "nvme")}
    sections: dict[str, Any] = {"optimizer": {"lr": 1e-3}, "engine": there}
    config = tiny_config({"zero": 3, "offload": offload}, wide, {"microbatch": 2}, **sections)
    try:
        ours = pool.run(curve_of, config, 6, world=2)[0]
    except EngineUnavailable as error:
        pytest.skip(str(error))
    native = pool.run(curve_of, on(config, "native"), 6, world=2)[0]
    assert same(ours, native), gaps(ours, native)
    files = [path.name for path in (tmp_path / "nvme").rglob("*.swp")]
    assert any("exp_avg" in name for name in files)
    assert any("param" in name for name in files) == (offload == "parameters")
    assert pool.run(journey, [(config, 3), (config, 6)], tmp_path / "saved", world=2)[0] == ours


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


@needs_deepspeed
@pytest.mark.parametrize("parallel", [{"zero": 2}, {"zero": 3}], ids=str)
def test_evaluation_is_alike(pool: WorkerPool, parallel: dict[str, object]) -> None:
    first, second, *ours = pool.run(evaluations, _config(parallel, GPT2), world=2)[0]
    assert [tokens for _, tokens in ours] == [first[1], second[1]] == [128, 128]
    assert [loss for loss, _ in ours] == pytest.approx([first[0], second[0]], rel=ENGINE_LOSS)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_llm.engine.deepspeed_library import import_deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'dist-llm\[deepspeed\]'") as caught:
        import_deepspeed(torch.device("cpu"))
    assert caught.value.exit_code == ExitCode.CONFIG
    assert "\n" not in str(caught.value)


def test_the_native_engine_imports_no_other() -> None:
    code = "import sys, dist_llm.engine.build; sys.exit(any(m in sys.modules for m in ('deepspeed', 'megatron')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
