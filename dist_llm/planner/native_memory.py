"""What a rank of the native engine holds: state by accounting/, activations by native_stage.py and the schedule.

Equal to `dist-llm plan dry-run`: parameters, gathered copies, gradients and optimizer state at their most, and beside
them the most activations that the schedule lets be alive at once. Of these, logits and pipeline buffers are told apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from dist_llm.accounting.held import rank_stages, stage_units
from dist_llm.accounting.memory import FORMAT_BYTES, Place, place_of
from dist_llm.accounting.peaks import gathered_bytes, gradient_bytes
from dist_llm.accounting.schedules import Pipe
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.run import RunConfig
from dist_llm.planner.components import Components, total
from dist_llm.planner.deepspeed_memory import deepspeed_state
from dist_llm.planner.messages import Program, write_programs
from dist_llm.planner.native_stage import loss_bytes, stage_memory
from dist_llm.planner.pipeline_memory import Stages, most_activations

Release = tuple[int, ...]
"""Of torch: its first two numbers."""

IN_PLACE: Release = (2, 15)
"""The release that adds gradients up in place, and takes a pipeline's buffers as they are needed, not for all a step."""


@lru_cache(maxsize=1)
def installed_torch() -> Release:
    """Return the release of torch that is installed, without its import; IN_PLACE where there is none."""
    try:
        return tuple(int(number) for number in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return IN_PLACE


@lru_cache(maxsize=1024)
def _programs(pipe: Pipe) -> list[Program]:
    return write_programs(pipe)


def native_rank(
    config: RunConfig, pipe: Pipe, data: int, index: int, release: Release
) -> tuple[dict[int, Components], Components]:
    """Return the components of each stage of a pipeline rank, and of the rank."""
    place = place_of(config.parallel, data, index, 0)
    stages = rank_stages(config.model, config.parallel, index)
    memories = {stage.index: stage_memory(config, stage) for stage in stages}
    states = {
        stage.index: _state(config, place, stage, (data * config.parallel.context, pipe.microbatches), release)
        for stage in stages
    }
    schedule = _Schedule(pipe, index, release >= IN_PLACE)
    rows = {
        stage.index: _with_activations(
            states[stage.index], config, schedule, {stage.index: memories[stage.index]}, stage.last
        )
        for stage in stages
    }
    last = any(stage.last for stage in stages)
    return rows, _with_activations(total(states.values()), config, schedule, memories, last)


@dataclass(frozen=True)
class _Schedule:
    """What a rank of a pipeline does; as_needed: it takes buffers when it receives."""

    pipe: Pipe
    index: int
    as_needed: bool


def _state(config: RunConfig, place: Place, stage: StagePlan, times: tuple[int, int], release: Release) -> Components:
    """Return the parameters, gradients and optimizer state of a stage, each at its most.

    times: ranks of data x context, and microbatches of a step.
    """
    if config.engine.name == "deepspeed":
        return deepspeed_state(config, place, stage)
    model, parallel, precision = config.model, config.parallel, config.precision
    tensors = [tensor for unit in stage_units(model, parallel, stage) for tensor in unit]
    master = FORMAT_BYTES[precision.master]
    here = parallel.offload != "parameters"
    return Components(
        parameters=sum(place.shard_numel(tensor) for tensor in tensors) * master * here,
        gathered=gathered_bytes(model, parallel, precision, place, stage),
        gradients=gradient_bytes(config, place, stage, *times, release >= IN_PLACE),
        optimizer=2 * sum(place.real_numel(tensor) for tensor in tensors) * master * (parallel.offload == "none"),
    )


def _with_activations(
    state: Components, config: RunConfig, schedule: _Schedule, memories: Stages, last: bool
) -> Components:
    """Add the most activations of these stages to their state: logits, buffers of a step, and the rest."""
    pipe = schedule.pipe
    most = most_activations(pipe, _programs(pipe)[schedule.index], memories, schedule.as_needed)
    logits = min(most, loss_bytes(config)) if last else 0
    whole = 0 if schedule.as_needed else pipe.microbatches
    buffers = min(most - logits, whole * sum(each.input + each.output for each in memories.values()))
    return replace(state, activations=most - logits - buffers, logits=logits, buffers=buffers)
