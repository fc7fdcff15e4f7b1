"""The only place with the order in which a model is split.

meta model of the stage -> tensor / sequence parallel -> context parallel -> weight gradients -> selective recompute
                        -> compile -> full recompute -> ZeRO -> materialise -> tie -> initialise

Full recompute is around a compiled block, not inside: so the block's input is all that stays wherever graphs are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from dist_llm.accounting.schedules import stage_rank
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.parallel import ParallelConfig
from dist_llm.ops.linear import WeightGradients
from dist_llm.parallel.async_tensor import apply_async_tensor
from dist_llm.parallel.compile import apply_compile, prepare_compile, require_compiler
from dist_llm.parallel.context import apply_context
from dist_llm.parallel.expert import apply_expert
from dist_llm.parallel.fused_accumulation import GradientTotals
from dist_llm.parallel.pipeline import StageModule
from dist_llm.parallel.recompute import apply_full_recompute, apply_selective_recompute
from dist_llm.parallel.replicas import ReplicaSum
from dist_llm.parallel.shards import LocalShard, list_shards
from dist_llm.parallel.split_backward import apply_weight_gradients
from dist_llm.parallel.tensor import apply_tensor
from dist_llm.parallel.zero import apply_zero, needs_fsdp, storage_device
from dist_llm.runtime.mesh import Mesh
from dist_llm.types import RecomputePlan, ShardPlan


@dataclass(frozen=True)
class SplittableModel:
    """What splitting needs to know of a model family; models and this layer are strangers.

    build: the meta module of a stage. blocks: its repeated parts; units: the ZeRO units, in forward order, of so many
    blocks each; experts: the units inside them whose replicas are those of the expert axes. operators: what in a block
    may be recomputed.
    tie: shares a tied weight whose two ends are both in the module. tied: (logical name, name of the copy) or None.
    allocate: gives a split meta module storage, parameters on one device and buffers on another. initialise: fills one
    shard with its starting values.
    """

    build: Callable[[StagePlan], nn.Module]
    experts: Callable[[nn.Module], list[nn.Module]]
    blocks: Callable[[nn.Module], list[nn.Module]]
    units: Callable[[nn.Module, int], list[list[nn.Module]]]
    tie: Callable[[nn.Module], None]
    plan: ShardPlan
    operators: RecomputePlan
    tied: tuple[str, str] | None
    allocate: Callable[[nn.Module, torch.device, torch.device], None]
    initialise: Callable[[LocalShard], None]


@dataclass(frozen=True)
class Formats:
    """compute: activations and products; master: stored weights, optimizer state and reductions."""

    compute: torch.dtype
    master: torch.dtype


@dataclass(frozen=True)
class SplitStage:
    """A materialised stage and this rank's shards of its parameters."""

    part: StageModule
    shards: tuple[LocalShard, ...]


def apply_layout(
    model: SplittableModel,
    stages: list[StagePlan],
    parallel: ParallelConfig,
    formats: Formats,
    mesh: Mesh,
    zero: bool = True,
) -> list[SplitStage]:
    """Build, split and fill this rank's stages of the model. Issues no collective.

    zero: False leaves weights whole over `zero` and their gradients to whoever shards them then (an engine's library).
    Raises ValueError where a setting would do nothing; the rules of config/rules.py refuse the same with more to say.
    """
    _refuse_what_would_do_nothing(parallel, formats)
    return [
        _split_stage(model, stage, parallel, formats, mesh, zero)
        for stage in stages
        if stage_rank(stage.index, mesh.pp.size, parallel.schedule) == mesh.pp.index
    ]


def _refuse_what_would_do_nothing(parallel: ParallelConfig, formats: Formats) -> None:
    if parallel.async_tensor and not parallel.sequence:
        raise ValueError("without sequence parallelism there is no gather or scatter to multiply beside")
    if parallel.async_tensor and parallel.compile:
        raise ValueError("a compiled graph does not hold the outputs that asynchronous linears hand over")
    if parallel.recompute == "none" and parallel.recompute_layers is not None:
        raise ValueError("of layers that are recomputed there are none")
    listed = parallel.recompute_operators
    if parallel.recompute == "selective" and len(set(listed)) < len(listed):
        raise ValueError("an operator that is named twice is recomputed once")
    if parallel.offload == "parameters" and parallel.zero == 0:
        raise ValueError("without ZeRO there are no shards to keep in host memory")
    if parallel.fused_accumulation and (parallel.zero >= 2 or formats.compute == formats.master):
        raise ValueError("there is no sum of whole gradients in a wider format to add to")


def _split_stage(
    model: SplittableModel, stage: StagePlan, parallel: ParallelConfig, formats: Formats, mesh: Mesh, zero: bool
) -> SplitStage:
    module = model.build(stage).to(formats.master)
    table = apply_tensor(module, model.plan, mesh.tp, mesh.expert.ep.size, parallel.sequence)
    if parallel.async_tensor:
        apply_async_tensor(module, model.plan, mesh.tp, mesh.device)
    apply_expert(module, mesh.expert.ep)
    apply_context(module, mesh.context)
    later = _weight_gradients(module, parallel, formats)
    _apply_recompute_and_compile(model, module, parallel, mesh.device)
    sharded = zero and needs_fsdp(mesh, formats.compute, formats.master, parallel.offload)
    if sharded:
        policy = MixedPrecisionPolicy(
            param_dtype=formats.compute, reduce_dtype=formats.master, output_dtype=formats.compute
        )
        apply_zero(module, model.units(module, parallel.unit_blocks), model.experts(module), mesh, parallel, policy)
    model.allocate(module, storage_device(mesh, parallel.offload), mesh.device)
    model.tie(module)
    shards = tuple(list_shards(module, table, mesh, model.tied))
    for shard in shards:
        model.initialise(shard)
    replicas = ReplicaSum(shards if zero and not sharded else (), mesh, parallel.bucket_mib << 20)
    waiting = later if parallel.splits_backward else None
    return SplitStage(StageModule(module, stage.index, stage.count, replicas, waiting), shards)


def _apply_recompute_and_compile(
    model: SplittableModel, module: nn.Module, parallel: ParallelConfig, device: torch.device
) -> None:
    """Recompute some operators inside of the blocks, compile these, and recompute whole ones around that, in place."""
    blocks = model.blocks(module)
    if parallel.compile:
        require_compiler(parallel.compile_backend, device)
        prepare_compile(blocks)
    if parallel.recompute == "selective":
        operators = [model.operators[name] for name in parallel.recompute_operators]
        apply_selective_recompute(blocks[: parallel.recompute_layers], operators)
    if parallel.compile:
        apply_compile(blocks, parallel.compile_backend)
    if parallel.recompute == "full":
        apply_full_recompute(blocks[: parallel.recompute_layers])


def _weight_gradients(module: nn.Module, parallel: ParallelConfig, formats: Formats) -> WeightGradients | None:
    """Let linears' weight gradients wait, or go straight into sums, or both, where the layout says so."""
    if not (parallel.splits_backward or parallel.fused_accumulation):
        return None
    totals = GradientTotals(module, formats.master) if parallel.fused_accumulation else None
    later = WeightGradients(totals, waits=parallel.splits_backward)
    apply_weight_gradients(module, later)
    return later
