"""Jobs for the pool of gloo ranks that run any engine: its curve, its state, and runs that change engines."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dist_llm.config.run import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.engine.build import build_engine
from dist_llm.runtime.mesh import build_control_group, build_mesh
from dist_llm.train.checkpoints import Checkpoints
from dist_llm.train.identity import identity_of, layout_of, recipe_of
from dist_llm.train.trace import Rectangle
from dist_llm.types import StepResult
from tests.parallel.tiny import Curve, random_batch
from tests.tolerances import ENGINE_LOSS, ENGINE_NORM


def on(config: RunConfig, engine: str) -> RunConfig:
    """Return the same run on another engine, and without what only DeepSpeed has."""
    tree = config.model_dump()
    tree["engine"] = {**tree["engine"], "name": engine} if engine == "deepspeed" else {"name": engine}
    return RunConfig.model_validate(tree)


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


def results(config: RunConfig, steps: int) -> list[StepResult]:
    """Train and return what each step says."""
    with running(config) as engine:
        return [engine.train_step(random_batch(config, engine.data_slice, step)) for step in range(steps)]


def curve_of(config: RunConfig, steps: int) -> Curve:
    """Train and return (loss, gradient norm) of each step."""
    return [(result.loss, result.grad_norm) for result in results(config, steps)]


def curves(config: RunConfig, steps: int, engines: tuple[str, ...]) -> list[Curve]:
    """Train on one engine after another in the same processes."""
    return [curve_of(on(config, engine), steps) for engine in engines]


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
    done, whole = 0, []
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
                warn=lambda message: None,
            )
            if done:
                assert checkpoints.restore(must=True)[0] == done
            for step in range(done, stop):
                result = engine.train_step(random_batch(config, engine.data_slice, step))
                whole.append((result.loss, result.grad_norm))
            checkpoints.save(stop, tokens=0)
            done = stop
    return whole
