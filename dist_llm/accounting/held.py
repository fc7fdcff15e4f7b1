"""Which parameters a rank holds: by pipeline stage, by ZeRO unit, with the shape of its tp share.

A unit is what ZeRO gathers and scatters in one collective: the embedding, the experts of a block, the rest of one or
more blocks, or the head; embedding and head are one when they are tied in one stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from dist_llm.accounting.params import ParamSpec, embedding_parameters, head_parameters, layer_parameters
from dist_llm.accounting.schedules import stage_rank
from dist_llm.accounting.stages import StagePlan, plan_stages
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig


@dataclass(frozen=True)
class HeldTensor:
    """A parameter as one rank holds it before ZeRO: rows x row_numel elements.

    partial: its gradient is a partial sum over tp. late: a split backward gives its gradient in the second half.
    expert: it is part of some experts, and its replicas are fewer.
    """

    name: str
    rows: int
    row_numel: int
    partial: bool
    late: bool
    expert: bool

    @property
    def numel(self) -> int:
        """Elements of the tp share, vocabulary padding included."""
        return self.rows * self.row_numel

    def shard_rows(self, shards: int, index: int) -> int:
        """Return the rows of ZeRO chunk `index` of `shards` (torch.chunk: all but the last are ceil(rows / shards))."""
        chunk = -(-self.rows // shards)
        return max(0, min(self.rows, (index + 1) * chunk) - index * chunk)

    def padded_shard_numel(self, shards: int) -> int:
        """Return the elements that FSDP2 allocates for any chunk: ceil(rows / shards) rows."""
        return -(-self.rows // shards) * self.row_numel


Unit = tuple[HeldTensor, ...]


def _partial(name: str, model: ModelConfig, sequence: bool) -> bool:
    """Return whether the gradient of a replicated parameter is partial over tp."""
    module, _, leaf = name.rpartition(".")
    if module.endswith((".q_norm", ".k_norm", ".router")):
        return True
    replicated = module.endswith(("norm", "positions")) or (leaf == "bias" and module.endswith((".wo", ".down")))
    return sequence and replicated


def _late(name: str, parallel: ParallelConfig | _Split) -> bool:
    """Return whether it is the gradient of a linear, an expert's too; not of a bias that follows a sum over tp."""
    module, _, leaf = name.rpartition(".")
    linear = module.rpartition(".")[2]
    if linear in ("wo", "down"):
        return leaf == "weight" or parallel.tensor == 1
    return linear in ("wq", "wk", "wv", "gate", "up", "projection")


def _unit(specs: list[ParamSpec], model: ModelConfig, parallel: ParallelConfig | _Split) -> Unit:
    held = []
    for spec in specs:
        shape = spec.local_shape(parallel.tensor, parallel.expert)
        partial = parallel.tensor > 1 and _partial(spec.name, model, parallel.sequence)
        late = _late(spec.name, parallel)
        held.append(HeldTensor(spec.name, shape[0], math.prod(shape[1:]), partial, late, spec.expert))
    return tuple(held)


def stage_units(model: ModelConfig, parallel: ParallelConfig, stage: StagePlan) -> list[Unit]:
    """Return the ZeRO units of a stage in forward order; the shared unit of a tied pair, the root, comes last."""
    split = _Split(parallel.tensor, parallel.sequence, parallel.expert, parallel.unit_blocks)
    return list(_stage_units(model, split, stage))


@dataclass(frozen=True)
class _Split:
    """What of a layout decides who holds which parameters, by the names that it has there."""

    tensor: int
    sequence: bool
    expert: int
    unit_blocks: int


@lru_cache(maxsize=4096)
def _stage_units(model: ModelConfig, parallel: _Split, stage: StagePlan) -> tuple[Unit, ...]:
    layers: list[Unit] = []
    for start in range(0, len(stage.layers), parallel.unit_blocks):
        blocks = [list(layer_parameters(model, at)) for at in stage.layers[start : start + parallel.unit_blocks]]
        layers += [_unit([spec for spec in specs if spec.expert], model, parallel) for specs in blocks]
        layers.append(_unit([spec for specs in blocks for spec in specs if not spec.expert], model, parallel))
    embed = list(embedding_parameters(model)) if stage.first else []
    head = list(head_parameters(model)) if stage.last else []
    if model.tie_embeddings and stage.first and stage.last:
        shared = [spec for spec in [*embed, *head] if spec.name != "head.projection.weight"]
        return tuple(unit for unit in (*layers, _unit(shared, model, parallel)) if unit)
    units = [_unit(embed, model, parallel), *layers, _unit(head, model, parallel)]
    return tuple(unit for unit in units if unit)


def stage_tensors(model: ModelConfig, parallel: ParallelConfig, stage: StagePlan) -> Unit:
    """Return the tensors of a stage in the order in which the module holds them, a tied pair in one stage once."""
    specs = list(embedding_parameters(model)) if stage.first else []
    specs += [spec for index in stage.layers for spec in layer_parameters(model, index)]
    both = model.tie_embeddings and stage.first
    head = head_parameters(model) if stage.last else ()
    specs += [spec for spec in head if not (both and spec.name == "head.projection.weight")]
    return _unit(specs, model, parallel)


def rank_stages(model: ModelConfig, parallel: ParallelConfig, pipeline_index: int) -> list[StagePlan]:
    """Return the stages that pipeline rank `pipeline_index` holds, earliest first."""
    return [
        stage
        for stage in plan_stages(model, parallel.num_stages)
        if stage_rank(stage.index, parallel.pipeline, parallel.schedule) == pipeline_index
    ]
