"""Build a run on a world that is not there, and say what each rank would hold and send.

    fake process group of any size -> tensors without values -> the engine's own build -> two microbatches a stage

Parameters, gradients and optimizer state are those of what was built; activations are measured on it
(parallel/stage_memory.py) and put in the order of the schedule (planner/pipeline_memory.py); accounting/traffic.py
says what is sent. Ranks of a pipeline that hold alike stages are built once. Experts are taken as evenly used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_llm.accounting.held import rank_stages
from dist_llm.accounting.memory import place_of
from dist_llm.accounting.params import num_parameters
from dist_llm.accounting.peaks import gathered_bytes, gradient_bytes
from dist_llm.accounting.schedules import Pipe
from dist_llm.accounting.stage_memory import StageMemory
from dist_llm.accounting.stages import StagePlan
from dist_llm.accounting.traffic import Shapes, Traffic, step_traffic
from dist_llm.config.rules import num_microbatches
from dist_llm.config.run import RunConfig
from dist_llm.engine.kernels import foretold_kernels
from dist_llm.engine.model import splittable
from dist_llm.engine.native import NativeEngine
from dist_llm.engine.recipe import DTYPES
from dist_llm.parallel.activations import ActivationLog
from dist_llm.parallel.apply import SplitStage, SplittableModel
from dist_llm.parallel.live import storage_bytes
from dist_llm.parallel.materialise import allocate
from dist_llm.parallel.pipeline import BUFFERS_AS_NEEDED
from dist_llm.parallel.stage_memory import StageRun, measure_stage
from dist_llm.parallel.whole_gradients import IN_GRAD
from dist_llm.planner.messages import Program, prove, write_programs
from dist_llm.planner.pipeline_memory import most_activations
from dist_llm.runtime.fake_group import fake_group
from dist_llm.runtime.mesh import Mesh, build_mesh


@dataclass(frozen=True)
class StageFacts:
    """What a stage is on one rank: bytes of stored parameters and of optimizer state on the device, bytes that are in
    host memory instead, and activations by microbatch.
    """

    param_bytes: int
    optimizer_bytes: int
    host_bytes: int
    activations: StageMemory


def dry_run(config: RunConfig, ranks: int, report: Callable[[str], None] = lambda message: None) -> dict[str, object]:
    """Return, JSON-able, what each pipeline rank and stage of a config on `ranks` ranks holds and sends.

    Stands for the rank at index 0 of all other axes, which holds the most. Issues collectives that move nothing. What
    the config check would refuse ends in a ValueError, RuntimeError or AssertionError, from where it cannot be built.
    """
    pipe = _pipe(config, ranks)
    by_rank: list[dict[str, object]] = []
    by_stage: dict[int, dict[str, object]] = {}
    programs = write_programs(pipe)
    prove(pipe, programs)
    for index, built in enumerate(build_ranks(config, ranks, report)):
        row, rows = _describe(config, ranks, index, pipe, programs[index], built)
        by_rank.append(row)
        by_stage.update(rows)
    return {
        "num_params": num_parameters(config.model),
        "ranks": ranks,
        "microbatches": pipe.microbatches,
        "global_batch": config.data.global_batch,
        "microbatch": config.data.microbatch,
        "seq_len": config.data.seq_len,
        "precision": config.precision.name,
        "zero": config.parallel.zero,
        "schedule": config.parallel.schedule,
        "recompute": config.parallel.recompute,
        "stages": [by_stage[stage] for stage in sorted(by_stage)],
        "pipeline_ranks": by_rank,
    }


def _pipe(config: RunConfig, ranks: int) -> Pipe:
    microbatches = num_microbatches(config, ranks)
    if microbatches is None:
        raise ValueError("the global batch must be whole microbatches on each data rank")
    parallel = config.parallel
    return Pipe(
        parallel.schedule if parallel.pipeline > 1 else "1f1b", parallel.pipeline, parallel.chunks, microbatches
    )


def build_ranks(config: RunConfig, ranks: int, report: Callable[[str], None]) -> list[list[StageFacts]]:
    """Return the stages of each pipeline rank; ranks with alike stages are built once."""
    count = config.parallel.pipeline
    built: dict[tuple[object, ...], list[StageFacts]] = {}
    found = []
    for index in range(count):
        kind = tuple(_kind(config, stage) for stage in rank_stages(config.model, config.parallel, index))
        if kind not in built:
            report(f"building pipeline rank {index} of {count}")
            built[kind] = build_rank(config, ranks, index)
        found.append(built[kind])
    return found


def build_rank(config: RunConfig, ranks: int, pipeline_index: int) -> list[StageFacts]:
    """Build the first rank of a pipeline index on a fake group, run its stages and one update; return its stages."""
    # Compiled code does not run on tensors without values, and needs no compiler then: activations are those of blocks
    # that are not compiled.
    parallel = config.parallel.model_copy(update={"compile_backend": "aot_eager"})
    config = config.model_copy(update={"parallel": parallel})
    as_written = torch.compiler.set_stance("force_eager")
    with fake_group(ranks, pipeline_index * (ranks // parallel.pipeline)), as_written:
        mesh = build_mesh(parallel, torch.device("cpu"))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        kernels = foretold_kernels(config)
        model = without_values(splittable(config.model, config.run.seed, kernels), mode)
        engine = NativeEngine(config, mesh, model, kernels)
        with mode:
            memories = [
                measure_stage(_stage_run(config, engine, stage, mesh), ActivationLog(state_groups(mesh)))
                for stage in engine.stages
            ]
            engine.finish_gradients()
            gradients = [shard.gradient() for shard in engine.shards]
            engine.optimizer.step(gradients, config.optimizer.lr, torch.ones((), dtype=torch.float64))
        facts = [
            _facts(engine, stage, memory, config.parallel.offload)
            for stage, memory in zip(engine.stages, memories, strict=True)
        ]
        engine.close()
    return facts


def _kind(config: RunConfig, stage: StagePlan) -> tuple[object, ...]:
    """Return what a stage's memory depends on."""
    experts = sum(config.model.has_experts(layer) for layer in stage.layers)
    return stage.first, stage.last, len(stage.layers), experts


def without_values(model: SplittableModel, mode: FakeTensorMode) -> SplittableModel:
    """Return the model with tensors that have shapes and no values."""

    def allocate_shapes(module: nn.Module, stored: torch.device, device: torch.device) -> None:
        with mode:
            allocate(module, stored, device)

    return replace(model, allocate=allocate_shapes, initialise=lambda shard: None)


def state_groups(mesh: Mesh) -> list[str]:
    """Return the names of the process groups over which ZeRO gathers and reduces."""
    axes = (mesh.zero, mesh.shard, mesh.replicate, mesh.expert.zero, mesh.expert.shard, mesh.expert.replicate)
    return [axis.group.group_name for axis in axes]


def _stage_run(config: RunConfig, engine: NativeEngine, stage: SplitStage, mesh: Mesh) -> StageRun:
    """Return a stage with a microbatch that has no values."""
    data, parallel = config.data, config.parallel
    share = data.seq_len // mesh.cp.size
    length = share // mesh.tp.size if parallel.sequence else share
    first, last = stage.part.index == 0, stage.part.index == stage.part.count - 1
    dtype = DTYPES[config.precision.compute]

    def enter() -> Tensor:
        if first:
            return torch.empty((data.microbatch, share), dtype=torch.int64)
        return torch.empty((data.microbatch, length, config.model.hidden_size), dtype=dtype, requires_grad=True)

    extras = {"samples": torch.empty((data.microbatch,), dtype=torch.int64)}
    if data.document_mask:
        extras["documents"] = torch.empty((data.microbatch, data.seq_len), dtype=torch.int64)
    targets = torch.empty((data.microbatch, share), dtype=torch.int64)
    loss = engine.loss if last else None
    return StageRun(stage.part, enter, loss, targets, extras, parallel.zero, keeps=parallel.pipeline > 1)


def _facts(engine: NativeEngine, stage: SplitStage, memory: StageMemory, offload: str) -> StageFacts:
    ours = {id(shard) for shard in stage.shards}
    slots = [slot for shard, slot in zip(engine.shards, engine.optimizer.slots, strict=True) if id(shard) in ours]
    moments = storage_bytes(moment for slot in slots for moment in (slot.exp_avg, slot.exp_avg_sq))
    stored = storage_bytes(shard.tensor for shard in stage.shards)
    if offload == "none":
        return StageFacts(stored, moments, 0, memory)
    # On the host: moments, gradients, and the masters beside the device's weights or the only shards there are.
    return StageFacts(stored if offload == "optimizer" else 0, 0, moments + 2 * stored, memory)


def _describe(
    config: RunConfig, ranks: int, pipeline_index: int, pipe: Pipe, program: Program, built: list[StageFacts]
) -> tuple[dict[str, object], dict[int, dict[str, object]]]:
    """Return the rows of a pipeline rank and of its stages."""
    parallel, model, precision = config.parallel, config.model, config.precision
    data = ranks // parallel.model_ranks
    place, replicas = place_of(parallel, data, pipeline_index, 0), data * parallel.context
    shapes = Shapes(model, parallel, precision, config.data, place, data)
    stages = rank_stages(model, parallel, pipeline_index)
    rows: dict[int, dict[str, object]] = {}
    total = dict.fromkeys(_SUMMED, 0)
    for stage, facts in zip(stages, built, strict=True):
        sizes = {
            "param_bytes": facts.param_bytes,
            "gathered_param_bytes": gathered_bytes(model, parallel, precision, place, stage),
            "grad_bytes": gradient_bytes(config, place, stage, replicas, pipe.microbatches, IN_GRAD),
            "optimizer_bytes": facts.optimizer_bytes,
            "host_bytes": facts.host_bytes,
        }
        total = {name: total[name] + sizes[name] for name in _SUMMED}
        peak = most_activations(pipe, program, {stage.index: facts.activations}, BUFFERS_AS_NEEDED)
        where = {"stage": stage.index, "pipeline_rank": pipeline_index}
        layers = {"first_layer": stage.layers.start, "num_layers": len(stage.layers)}
        microbatch = asdict(facts.activations)
        rows[stage.index] = {
            **where,
            **layers,
            **sizes,
            "peak_activation_bytes": peak,
            "microbatch": microbatch,
            "traffic": _traffic_row(step_traffic(shapes, stage)),
        }
    memories = {stage.index: facts.activations for stage, facts in zip(stages, built, strict=True)}
    peak = most_activations(pipe, program, memories, BUFFERS_AS_NEEDED)
    return {
        "pipeline_rank": pipeline_index,
        "stages": [stage.index for stage in stages],
        **total,
        "peak_activation_bytes": peak,
        "peak_bytes": sum(total.values()) - total["host_bytes"] + peak,
        "traffic": _traffic_row(step_traffic(shapes)),
    }, rows


_SUMMED = ("param_bytes", "gathered_param_bytes", "grad_bytes", "optimizer_bytes", "host_bytes")


def _traffic_row(traffic: Traffic) -> dict[str, dict[str, dict[str, int]]]:
    """Return collectives of a step by axis and kind."""
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for (axis, kind), count in sorted(traffic.counts.items()):
        entry = {"count": count, "payload_bytes": traffic.payload_bytes[axis, kind]}
        rows.setdefault(axis, {})[kind] = entry
    return rows
