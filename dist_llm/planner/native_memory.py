"""What a rank of the native engine holds: state by accounting/, activations by native_stage.py and the schedule.

Equal to `dist-llm plan dry-run`: parameters, gathered copies, gradients and optimizer state at their most, and beside
them the most activations that the schedule lets be alive at once. Of these, logits and pipeline buffers are told apart.
DeepSpeed trains the same model and keeps its own state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from dist_llm.accounting.held import rank_stages, stage_units
from dist_llm.accounting.memory import FORMAT_BYTES, Place, place_of, uses_fsdp
from dist_llm.accounting.peaks import gathered_bytes, gradient_bytes
from dist_llm.accounting.schedules import Pipe
from dist_llm.accounting.stage_memory import StageMemory
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.planner.components import Components, total
from dist_llm.planner.deepspeed_memory import deepspeed_state
from dist_llm.planner.native_stage import PartKey, kind_memory, loss_bytes, setting_of
from dist_llm.planner.pipeline_peaks import RankWork, most_bytes
from dist_llm.planner.stage_kind import Hashed, StageKind, kind_of, plan_of

Release = tuple[int, ...]
"""Of torch: its first two numbers."""

IN_PLACE: Release = (2, 15)
"""The release that adds gradients up in place, and takes a pipeline's buffers as it needs them, not for all a step."""


@lru_cache(maxsize=1)
def installed_torch() -> Release:
    """Return the release of torch that is installed, without its import; IN_PLACE where there is none."""
    try:
        return tuple(int(number) for number in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return IN_PLACE


class NativeMemory:
    """The native engine's memory under one config, on `data` data ranks."""

    def __init__(self, config: RunConfig, pipe: Pipe, data: int, release: Release) -> None:
        self._config, self._pipe, self._in_place = config, pipe, release >= IN_PLACE
        self._data, self._replicas = data, data * config.parallel.context
        model = Hashed(config.model)
        self._parts = PartKey(setting_of(config), model)
        self._state = StateKey(config, model, place_of(config.parallel, data, 0, 0), self._replicas, self._times())
        self._loss = loss_bytes(config)

    def _times(self) -> tuple[int, bool]:
        """Return microbatches, of which two are as many, and whether torch adds gradients up in place."""
        return min(2, self._pipe.microbatches), self._in_place

    def rank(self, index: int, by_stage: bool) -> tuple[dict[int, Components], Components]:
        """Return the components of each stage of a pipeline rank, if asked for, and of the rank."""
        stages = rank_stages(self._config.model, self._config.parallel, index)
        kinds = [kind_of(self._config, stage) for stage in stages]
        memories = [kind_memory(self._parts, kind) for kind in kinds]
        states = [_kind_state(self._state, kind) for kind in kinds]
        if not by_stage:
            return {}, self._with_activations(index, stages, memories, total(states))
        rows = {
            stage.index: self._with_activations(index, [stage], [memory], state)
            for stage, memory, state in zip(stages, memories, states, strict=True)
        }
        if len(stages) == 1:
            return rows, rows[stages[0].index]
        return rows, self._with_activations(index, stages, memories, total(states))

    def _with_activations(
        self, index: int, stages: Sequence[StagePlan], memories: Sequence[StageMemory], state: Components
    ) -> Components:
        """Add the most activations of these stages to their state: logits, buffers of a step, and the rest."""
        pipe, splits = self._pipe, self._config.parallel.splits_backward
        work = RankWork(pipe, index, tuple(stage.index for stage in stages), splits, self._in_place)
        most = most_bytes(work, memories)
        logits = min(most, self._loss) if any(stage.last for stage in stages) else 0
        times = 0 if self._in_place else pipe.microbatches
        buffers = min(most - logits, times * sum(memory.input + memory.output for memory in memories))
        found = state.having(activations=most - logits - buffers, logits=logits, buffers=buffers)
        return found.having(not_at_once=-self._never_together(state, most, len(stages)))

    def _never_together(self, state: Components, most: int, num_stages: int) -> int:
        """Return what the most gradients and the most activations are together beyond what they are at any moment.

        A backward frees activations block by block while it makes gradients: `kept` stay, the rest is on its way. Of a
        pipeline's stages, or where blocks run again in the backward, both can be there.
        """
        config = self._config
        if self._pipe.ranks > 1 or num_stages > 1 or config.parallel.recompute != "none":
            return 0
        again = self._pipe.microbatches > 1
        whole = again and config.parallel.zero < 2 and state.gathered
        kept = state.gradients if whole else min(state.parameters, state.gradients)
        passing, blocks = state.gradients - kept, config.model.num_layers + 1
        before = most + kept * again
        # FSDP reduces unit by unit; without it a bucket is filled first.
        passing = passing if state.gathered else passing // blocks
        first = most - most // blocks + passing + (kept if again else kept // blocks)
        last = most // blocks + state.gradients
        return most + state.gradients - max(before, first, last)


@dataclass(frozen=True)
class _StateSetting:
    """A config, a place in its layout whose pipeline rank means nothing, and how often there is what."""

    config: RunConfig
    place: Place
    replicas: int
    microbatches: int
    in_place: bool


class StateKey:
    """A setting, compared by what the state of a stage depends on."""

    __slots__ = ("_hash", "_seen", "setting")

    def __init__(
        self, config: RunConfig, model: Hashed[ModelConfig], place: Place, replicas: int, times: tuple[int, bool]
    ) -> None:
        p = config.parallel
        split = (p.tensor, p.sequence, p.expert, p.unit_blocks)
        zero = (p.zero, p.offload, p.prefetch, p.bucket_mib, replicas > 1)
        self._seen = (model, split, zero, config.precision.name, config.engine.name, place, times)
        self._hash = hash(self._seen)
        self.setting = _StateSetting(config, place, replicas, *times)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateKey) and self._seen == other._seen


@lru_cache(maxsize=16384)
def _kind_state(key: StateKey, kind: StageKind) -> Components:
    """Return the parameters, gradients and optimizer state of a stage of a kind.

    Where layers are alike and FSDP holds them, each unit beyond those that are gathered at once adds the same.
    """
    setting, layers = key.setting, kind.layers
    parallel, precision = setting.config.parallel, setting.config.precision
    unit = parallel.unit_blocks
    enough = (parallel.prefetch + 3) * unit + kind.num_layers % unit
    mixed = layers.dense and layers.experts
    if mixed or kind.num_layers <= enough + unit or not uses_fsdp(parallel, precision, setting.place.shards):
        return _state(setting, kind)
    few, more = (_state(setting, _of_layers(kind, count)) for count in (enough, enough + unit))
    times = (kind.num_layers - enough) // unit
    sizes = zip(few.by_name().items(), more.by_name().values(), strict=True)
    return Components(**{name: one + times * (other - one) for (name, one), other in sizes})


def _of_layers(kind: StageKind, count: int) -> StageKind:
    layers = replace(kind.layers, dense=count if kind.layers.dense else 0, experts=count if kind.layers.experts else 0)
    return replace(kind, layers=layers)


def _state(setting: _StateSetting, kind: StageKind) -> Components:
    """Return the parameters, gradients and optimizer state of a stage, each at its most."""
    config, place = setting.config, setting.place
    model, parallel, precision = config.model, config.parallel, config.precision
    stage = plan_of(model, kind)
    if config.engine.name == "deepspeed":
        return deepspeed_state(config, place, stage)
    tensors = [tensor for unit in stage_units(model, parallel, stage) for tensor in unit]
    master = FORMAT_BYTES[precision.master]
    times = (setting.replicas, setting.microbatches, setting.in_place)
    return Components(
        parameters=sum(map(place.shard_numel, tensors)) * master * (parallel.offload != "parameters"),
        gathered=gathered_bytes(model, parallel, precision, place, stage),
        gradients=gradient_bytes(config, place, stage, *times),
        optimizer=2 * sum(map(place.real_numel, tensors)) * master * (parallel.offload == "none"),
    )
