"""How layers are dealt to pipeline stages: contiguous runs, so that the dearest stage is as cheap as it can be.

    cost of a stage = weights that multiply each token: of its layers, of the head, of one row of the embedding

Layers count alike: where some have experts and some have none, the mean.

A layer goes to the stage that is cheapest so far, of equals the last: early stages hold more microbatches in flight.
Llama 3 405B (126 layers, 16 stages) gets 8 a stage but 7 in the first and the last, as Dubey et al. 2024 have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from dist_llm.accounting.flops import matmul_parameters
from dist_llm.config.model import ModelConfig


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


def plan_stages(model: ModelConfig, count: int) -> list[StagePlan]:
    """Return `count` stages in order, each with a layer at least; schedules.stage_rank says where each runs.

    Raises ValueError where there are fewer layers.
    """
    return list(_deal(model, count))


@lru_cache(maxsize=4096)
def _deal(model: ModelConfig, count: int) -> tuple[StagePlan, ...]:
    if count > model.num_layers:
        raise ValueError(f"{model.num_layers} layers cannot fill {count} stages")
    head = model.vocab_size * model.hidden_size
    layer = (matmul_parameters(model) - head) // model.num_layers
    costs = [layer] * count
    costs[0] += model.hidden_size
    costs[-1] += head
    sizes = [1] * count
    for _ in range(model.num_layers - count):
        cheapest = min(range(count), key=lambda index: (costs[index], -index))
        costs[cheapest] += layer
        sizes[cheapest] += 1
    ends = list(accumulate(sizes))
    return tuple(StagePlan(index, count, range(end - sizes[index], end)) for index, end in enumerate(ends))


def engine_stages(engine: str, model: ModelConfig, count: int) -> list[StagePlan]:
    """Return the stages as an engine deals layers: Megatron-Core equally many to each, where they divide."""
    if engine != "megatron" or model.num_layers % count:
        return plan_stages(model, count)
    size = model.num_layers // count
    return [StagePlan(index, count, range(index * size, (index + 1) * size)) for index in range(count)]
