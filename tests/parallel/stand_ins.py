"""Stand-ins for the engines of other libraries: the native engine under their names, whole or with a fault."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import torch.distributed as dist

from dist_llm.config.run import RunConfig
from dist_llm.engine.native import NativeEngine
from dist_llm.runtime.mesh import Mesh


def sound(config: RunConfig, mesh: Mesh) -> NativeEngine:
    """Return the native engine, whatever the config names."""
    return NativeEngine(config, mesh)


def other_rate(config: RunConfig, mesh: Mesh) -> NativeEngine:
    """Return an engine that learns 1 % faster under deepspeed's name."""
    if config.engine.name == "deepspeed":
        faster = config.optimizer.model_copy(update={"lr": 1.01 * config.optimizer.lr})
        config = config.model_copy(update={"optimizer": faster})
    return NativeEngine(config, mesh)


class LostSum(NativeEngine):
    """An engine whose ranks keep their own gradients: what should sum them over data ranks leaves them as they are."""

    def finish_gradients(self) -> None:
        """Finish with every all-reduce dropped."""
        with ExitStack() as faults:
            faults.enter_context(patch.object(dist, "all_reduce", lambda *args, **kwargs: None))
            super().finish_gradients()


def lost_sum(config: RunConfig, mesh: Mesh) -> NativeEngine:
    """Return an engine that drops the sum of gradients under deepspeed's name."""
    return LostSum(config, mesh) if config.engine.name == "deepspeed" else NativeEngine(config, mesh)


class Forgetful(NativeEngine):
    """An engine that resumes without its second moments."""

    def restore(self, facts: dict[str, object]) -> None:
        """Take the facts over and forget."""
        super().restore(facts)
        for slot in self.optimizer.slots:
            slot.exp_avg_sq.zero_()


def forgetful(config: RunConfig, mesh: Mesh) -> NativeEngine:
    """Return an engine that forgets under deepspeed's name."""
    return Forgetful(config, mesh) if config.engine.name == "deepspeed" else NativeEngine(config, mesh)
