"""How layers are dealt to pipeline stages: contiguous runs, as even as the count allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagePlan:
    """What one pipeline stage holds: a run of layers, the embedding if first, the head if last."""

    index: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether this stage holds the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether this stage holds the head."""
        return self.index == self.count - 1


def plan_stages(num_layers: int, count: int) -> list[StagePlan]:
    """Return `count` stages in order; schedules.stage_rank says where each runs."""
    bounds = [index * num_layers // count for index in range(count + 1)]
    return [StagePlan(index, count, range(bounds[index], bounds[index + 1])) for index in range(count)]
