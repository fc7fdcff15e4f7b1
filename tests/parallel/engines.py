"""Jobs for the pool of gloo ranks that run any engine: its curve, its state, and runs that change engines."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_llm.config.run import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.engine.build import build_engine
from dist_llm.runtime.mesh import build_control_group, build_mesh
from dist_llm.train.checkpoints import Checkpoints
from dist_llm.train.engines import on_engine
from dist_llm.train.identity import identity_of, layout_of, recipe_of
from dist_llm.train.trace import Rectangle
from dist_llm.types import StepResult
from tests.parallel.tiny import Curve, random_batch, tiny_config
from tests.tolerances import ENGINE_LOSS, ENGINE_NORM

RATES = {"native": 1e-3, "deepspeed": 1e-2, "megatron": 1e-3}
"""Learning rates; at 1e-2 Adam's first steps turn rounding into gaps near the bounds (megatron's norm: 6e-5)."""


def engine_config(
    name: str,
    parallel: dict[str, object],
    model: dict[str, object] | None = None,
    deep: bool | None = None,
    **sections: Any,
) -> RunConfig:
    """Return a tiny run of 20 steps on an engine; deep: of four layers and 16 sequences, by default where it is split.

    So it has two microbatches a data rank or more, and two layers a stage.
    """
    deep = "pipeline" in parallel or "expert" in parallel if deep is None else deep
    shape: dict[str, object] = {"num_layers": 4 if deep else 2}
    batch: dict[str, object] = {"global_batch": 16 if deep else 8, "microbatch": 2}
    own = {"run": {"steps": 20, "seed": 1}, "engine": {"name": name}, "optimizer": {"lr": RATES[name]}}
    return tiny_config(parallel, {**(model or {}), **shape}, batch, **{**own, **sections})


@contextlib.contextmanager
def running(config: RunConfig) -> Iterator[Engine]:
    """Build the configured engine over the current process group, and close it; it must print and leave nothing."""
    before, printed = dict(os.environ), io.StringIO()
    with contextlib.redirect_stdout(printed):
        engine = build_engine(config, build_mesh(config.parallel, torch.device("cpu")))
        try:
            yield engine
        finally:
            engine.close()
    assert dict(os.environ) == before
    assert printed.getvalue() == ""


def threads() -> int:
    """Return the threads of this rank: each group that is not freed keeps some that poll."""
    return len(list(Path("/proc/self/task").iterdir()))


def results(config: RunConfig, steps: int) -> list[StepResult]:
    """Train and return what each step says."""
    with running(config) as engine:
        return [engine.train_step(random_batch(config, engine.data_slice, step)) for step in range(steps)]


def curve_of(config: RunConfig, steps: int) -> Curve:
    """Train and return (loss, gradient norm) of each step."""
    return [(result.loss, result.grad_norm) for result in results(config, steps)]


def curves(config: RunConfig, steps: int) -> list[Curve]:
    """Train on the native engine, then in the same processes on that of the config."""
    return [curve_of(on_engine(config, engine), steps) for engine in ("native", config.engine.name)]


def gaps(ours: Curve, theirs: Curve) -> tuple[float, float]:
    """Return the largest relative differences of losses and of gradient norms; infinite where one is no number."""
    a, b = np.array(ours), np.array(theirs)
    largest = np.nan_to_num(np.abs(a - b) / np.abs(b), nan=np.inf).max(axis=0)
    return float(largest[0]), float(largest[1])


def same(ours: Curve, theirs: Curve) -> bool:
    """Return whether two curves agree as those of two engines must."""
    loss, norm = gaps(ours, theirs)
    return len(ours) == len(theirs) and loss <= ENGINE_LOSS and norm <= ENGINE_NORM


def held(engine: Engine) -> list[Rectangle]:
    """Return copies of the rectangles that this rank saves."""
    return [(s.name, s.shape, s.offsets, s.data.numpy().copy()) for s in engine.state().tensors if s.primary]


def initial_state(config: RunConfig) -> list[Rectangle]:
    """Return what this rank would save before the first step."""
    with running(config) as engine:
        return held(engine)


def journey(legs: list[tuple[RunConfig, int]], root: Path) -> Curve:
    """Train each config up to its step, from the checkpoint of the one before; return the curve of all of it."""
    done, before, whole = 0, "", []
    said: list[str] = []
    group = build_control_group(120.0)
    for config, stop in legs:
        with running(config) as engine:
            checkpoints = Checkpoints(
                root=root,
                config=config.checkpoint,
                engine=engine,
                group=group,
                identity=identity_of(config, "", ""),
                layout=layout_of(config, dist.get_world_size(), "cpu"),
                recipe=recipe_of(config),
                report=lambda step: None,
                warn=said.append,
            )
            if done:
                assert checkpoints.restore(must=True)[0] == done
                assert any(" another engine: " in text for text in said) == (config.engine.name != before)
            before = config.engine.name
            for step in range(done, stop):
                result = engine.train_step(random_batch(config, engine.data_slice, step))
                whole.append((result.loss, result.grad_norm))
            checkpoints.save(stop, tokens=0)
            said.clear()
            done = stop
    return whole


def skipped_step(config: RunConfig, ruin: bool) -> dict[str, object]:
    """Run two steps that cannot be taken; ruin: a weight is not finite, and three updates went before.

    Return the facts of the engine at the end, whether each was skipped, and whether the first left all as it was.
    """
    with running(config) as engine:
        state = engine.state()
        for shard in state.tensors if ruin else ():
            if shard.name == "model.layers.0.mlp_norm.weight":
                shard.data.fill_(torch.inf)
        engine.restore({**state.facts, "optimizer_updates": 3 if ruin else 0})
        before = held(engine)
        first = engine.train_step(random_batch(config, engine.data_slice, 0))
        unchanged = all(np.array_equal(a[3], b[3]) for a, b in zip(before, held(engine), strict=True))
        again = engine.train_step(random_batch(config, engine.data_slice, 1))
        return {**engine.state().facts, "skipped": first.skipped, "again": again.skipped, "unchanged": unchanged}


def evaluations(config: RunConfig) -> list[tuple[float, int]]:
    """Return loss sum and tokens of a batch before a step and after it, natively and on the config's engine."""
    found = []
    for name in ("native", config.engine.name):
        with running(on_engine(config, name)) as engine:
            for step in range(2):
                loss = engine.eval_step(random_batch(config, engine.data_slice, 7))
                found.append((loss.loss, loss.tokens))
                engine.train_step(random_batch(config, engine.data_slice, step))
    return found


def without_host_adam(job: Any, *args: Any) -> Any:
    """Run a job where DeepSpeed's host Adam cannot be built, which takes a minute where it can."""
    from dist_llm.engine import deepspeed_library

    def load() -> None:
        raise RuntimeError("no compiler")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_library, "_host_adam", load)
        return job(*args)
