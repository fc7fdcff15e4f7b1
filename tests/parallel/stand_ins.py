"""Stand-ins for the engines of other libraries: the native engine under their names, whole or with a fault."""

from __future__ import annotations

from dist_llm.config.run import RunConfig
from dist_llm.engine.native import NativeEngine
from dist_llm.errors import EngineUnavailable
from dist_llm.runtime.mesh import Mesh
from dist_llm.types import Batch, StepResult
from tests.parallel.faults import planted


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
    """An engine that drops the sum of partial gradients."""

    fault = "gradient all-reduce dropped"

    def train_step(self, batch: Batch) -> StepResult:
        """Step with the fault in place."""
        with planted(self.fault):
            return super().train_step(batch)


class Averaged(LostSum):
    """An engine whose ZeRO averages gradients instead of summing them."""

    fault = "ZeRO averages gradients"


def lost_sum(config: RunConfig, mesh: Mesh) -> NativeEngine:
    """Return an engine that drops a sum of gradients under deepspeed's name."""
    return LostSum(config, mesh) if config.engine.name == "deepspeed" else NativeEngine(config, mesh)


def averaged(config: RunConfig, mesh: Mesh) -> NativeEngine:
    """Return an engine that averages gradients under deepspeed's name, from when it is built."""
    if config.engine.name != "deepspeed":
        return NativeEngine(config, mesh)
    with planted(Averaged.fault):
        return Averaged(config, mesh)


def missing(config: RunConfig, mesh: Mesh) -> NativeEngine:
    """Return the native engine, but none under deepspeed's name."""
    if config.engine.name == "deepspeed":
        raise EngineUnavailable("pip install 'dist-llm[deepspeed]'")
    return NativeEngine(config, mesh)


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
