"""Joins the transformer to the layer that splits it: the two are strangers to each other."""

from __future__ import annotations

from typing import cast

from torch import nn

from dist_llm.accounting.stages import StagePlan
from dist_llm.config.model import ModelConfig
from dist_llm.models.kernels import apply_kernels
from dist_llm.models.moe import MoE
from dist_llm.models.plan import RECOMPUTE_PLAN, SHARD_PLAN, TIED_PAIR, plan_init
from dist_llm.models.transformer import Block, Transformer, build_model
from dist_llm.ops.registry import Kernels
from dist_llm.parallel.apply import SplittableModel
from dist_llm.parallel.materialise import allocate, fill_normal
from dist_llm.parallel.shards import LocalShard


def _units(module: nn.Module, unit_blocks: int) -> list[list[nn.Module]]:
    """Return the ZeRO units of a stage in forward order; a tied embedding and head are left to the root together."""
    model = cast(Transformer, module)
    together = model.config.tie_embeddings and model.embed is not None and model.head is not None
    blocks: list[nn.Module] = list(model.layers.values())
    middle = [blocks[start : start + unit_blocks] for start in range(0, len(blocks), unit_blocks)]
    first: list[list[nn.Module]] = [] if together or model.embed is None else [[model.embed]]
    last: list[list[nn.Module]] = [] if together or model.head is None else [[model.head]]
    return [*first, *middle, *last]


def _layers(module: nn.Module) -> list[Block]:
    return [cast(Block, layer) for layer in cast(Transformer, module).layers.values()]


def splittable(config: ModelConfig, seed: int, kernels: Kernels | None = None) -> SplittableModel:
    """Return what splitting needs to know of the transformer. kernels: what computes its ops, None: the reference."""

    def build(stage: StagePlan) -> nn.Module:
        model = build_model(config, seed)
        model.keep_stage(stage.layers, stage.first, stage.last)
        apply_kernels(model, kernels or Kernels())
        return model

    def initialise(shard: LocalShard) -> None:
        init = plan_init(config, shard.name)
        if init.kind == "normal":
            fill_normal(shard, seed, init.std)
        else:
            shard.tensor.fill_(1.0 if init.kind == "ones" else 0.0)

    return SplittableModel(
        build=build,
        experts=lambda module: [layer.mlp.experts for layer in _layers(module) if isinstance(layer.mlp, MoE)],
        blocks=lambda module: list(_layers(module)),
        units=_units,
        tie=lambda module: cast(Transformer, module).tie_weights(),
        plan=SHARD_PLAN,
        operators=RECOMPUTE_PLAN,
        tied=TIED_PAIR if config.tie_embeddings else None,
        allocate=allocate,
        initialise=initialise,
    )
