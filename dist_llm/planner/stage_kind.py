"""Stages that cost the same: by their ends and how many layers of each kind they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from dist_llm.accounting.stages import StagePlan
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig

Held = TypeVar("Held")


class Hashed(Generic[Held]):
    """A value whose hash is taken once: sections of a config are slow to hash, and are keys of many tables."""

    __slots__ = ("_hash", "value")

    def __init__(self, value: Held) -> None:
        self.value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and (self.value is other.value or self.value == other.value)


@dataclass(frozen=True)
class Layers:
    """Layers of a stage by what they are: with experts or not, and of those the ones that are recomputed."""

    dense: int
    experts: int
    dense_again: int
    experts_again: int


@dataclass(frozen=True)
class StageKind:
    """What the bytes of a stage depend on, of the stage itself."""

    first: bool
    last: bool
    layers: Layers

    @property
    def num_layers(self) -> int:
        """Layers of both kinds."""
        return self.layers.dense + self.layers.experts


def kind_of(config: RunConfig, stage: StagePlan) -> StageKind:
    """Return the kind of a stage of a config."""
    model, again = config.model, config.parallel.recomputed_layers(stage.layers)
    count, repeated = len(stage.layers), len(again)
    first = min(count, max(0, model.moe.num_dense_layers - stage.layers.start)) if model.moe.num_experts else count
    early = min(first, repeated)
    return StageKind(stage.first, stage.last, Layers(first, count - first, early, repeated - early))


def plan_of(model: ModelConfig, kind: StageKind) -> StagePlan:
    """Return a stage of that kind; where in the model it lies means nothing but what its layers are."""
    start = model.moe.num_dense_layers - kind.layers.dense if kind.layers.experts else 0
    count = 1 if kind.first and kind.last else 3
    index = 0 if kind.first else count - 1 if kind.last else 1
    return StagePlan(index, count, range(start, start + kind.num_layers))
