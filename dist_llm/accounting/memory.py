"""Bytes of parameters, gradients and optimizer state that a rank of the native engine holds, at three points of a step.

    W, C  bytes of the master and compute formats;  P  elements of the tp share of this rank's stages
    S     sum over tensors of ceil(rows / shards) x row (FSDP2's allocation);  R  the same for this rank's real rows
    last forward    parameters S W + gathered S shards C  gradients 0, P W or S W  optimizer 2 R W
    before, after the update   S W                             S W                       2 R W

Without FSDP (nothing to shard, cast or fetch) S = R = P and nothing is gathered; nor is it by zero 3 at the last
forward. On the host are 4 R W (masters, moments, gradients) under offload=optimizer, all S W, R W under parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.accounting.held import HeldTensor, rank_stages, stage_units
from dist_llm.accounting.schedules import Pipe, Work
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.training import PrecisionConfig

FORMAT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one element."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model state at one point of a step: on the device, and all that is kept in host memory instead.

    With offloaded parameters the host's are an upper bound on a device other than CPU: FSDP2 then leaves out the
    padding of gradients.
    """

    parameters: int
    gradients: int
    optimizer: int
    host: int = 0


@dataclass(frozen=True)
class Place:
    """One rank's place: on the pp axis, and on ZeRO's shard axes of experts and of all else, with the axes' sizes."""

    pipeline_index: int
    shard_index: int
    shards: int
    expert_shard_index: int
    expert_shards: int

    def shards_of(self, tensor: HeldTensor) -> int:
        """Return the number of ranks that share a tensor."""
        return self.expert_shards if tensor.expert else self.shards

    def shard_numel(self, tensor: HeldTensor) -> int:
        """Return the elements that this rank allocates for a tensor."""
        return tensor.padded_shard_numel(self.shards_of(tensor))

    def real_numel(self, tensor: HeldTensor) -> int:
        """Return the elements of a tensor that this rank updates."""
        index = self.expert_shard_index if tensor.expert else self.shard_index
        return tensor.shard_rows(self.shards_of(tensor), index) * tensor.row_numel


def place_of(parallel: ParallelConfig, data: int, pipeline_index: int, zero_index: int) -> Place:
    """Return the place of a rank by its index on pp and on dp x cp."""
    if parallel.zero == 0:
        return Place(pipeline_index, 0, 1, 0, 1)
    shards = data * parallel.context // parallel.replicate
    index = zero_index % shards
    return Place(pipeline_index, index, shards, index // parallel.expert, shards // parallel.expert)


@dataclass(frozen=True)
class StepBytes:
    """Bytes after the last forward of a step, before the optimizer and after it."""

    last_forward: StateBytes
    before_update: StateBytes
    after_update: StateBytes


@dataclass(frozen=True)
class BackwardsDone:
    """What a rank has done of the backwards of one stage at its last forward.

    weights: whole backwards, or second halves. fresh: first halves since the last of these.
    """

    weights: int = 0
    fresh: int = 0


def backwards_at_last_forward(parallel: ParallelConfig, pipeline_index: int, microbatches: int) -> list[BackwardsDone]:
    """Return what is done of the backwards of each stage of this pipeline rank, earliest stage first."""
    if parallel.pipeline == 1:
        return [BackwardsDone(microbatches - 1)]
    order = Pipe(parallel.schedule, parallel.pipeline, parallel.chunks, microbatches).order(pipeline_index)
    last = max(index for index, action in enumerate(order) if action.work is Work.FORWARD)
    done: dict[int, BackwardsDone] = {}
    for action in order[:last]:
        before = done.setdefault(action.stage, BackwardsDone())
        if action.work in (Work.BACKWARD, Work.WEIGHT):
            done[action.stage] = BackwardsDone(before.weights + 1)
        elif action.work is Work.INPUT:
            done[action.stage] = BackwardsDone(before.weights, before.fresh + 1)
    return [done.get(stage, BackwardsDone()) for stage in sorted({action.stage for action in order})]


def uses_fsdp(parallel: ParallelConfig, precision: PrecisionConfig, shards: int) -> bool:
    """Return whether FSDP2 holds the parameters: there is something to shard, to cast or to fetch from the host."""
    return shards > 1 or precision.compute != precision.master or parallel.offload == "parameters"


def _waiting_gradients(
    tensors: list[HeldTensor], done: BackwardsDone, in_shards: bool, place: Place
) -> tuple[int, int]:
    """Return the elements of gradients that wait for later microbatches, not reduced and in shards (zero 2 and 3)."""
    early = sum(tensor.numel for tensor in tensors if not tensor.late) if done.fresh else 0
    if in_shards:
        return early, sum(place.shard_numel(tensor) for tensor in tensors if done.weights)
    return (sum(tensor.numel for tensor in tensors) if done.weights else early), 0


def step_bytes(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, place: Place, microbatches: int
) -> StepBytes:
    """Return the bytes of model state of one rank through a step of `microbatches` microbatches."""
    master, compute = FORMAT_BYTES[precision.master], FORMAT_BYTES[precision.compute]
    fsdp = uses_fsdp(parallel, precision, place.shards)
    stages = rank_stages(model, parallel, place.pipeline_index)
    by_stage = [[tensor for unit in stage_units(model, parallel, stage) for tensor in unit] for stage in stages]
    tensors = [tensor for held in by_stage for tensor in held]
    shards = sum(place.shard_numel(tensor) for tensor in tensors)
    real = sum(place.real_numel(tensor) for tensor in tensors)
    whole = sum(place.shard_numel(tensor) * place.shards_of(tensor) for tensor in tensors)
    gathered = whole if fsdp and parallel.zero < 3 else 0
    backwards = backwards_at_last_forward(parallel, place.pipeline_index, microbatches)
    waiting = [
        _waiting_gradients(held, done, fsdp and parallel.zero >= 2, place)
        for held, done in zip(by_stage, backwards, strict=True)
    ]
    whole_gradients, in_shards = (sum(elements) * master for elements in zip(*waiting, strict=True))
    stored, moments = shards * master, 2 * real * master
    if parallel.offload == "parameters":
        # Shards that replicas have yet to add up stay where they are sent from.
        early, late = (in_shards, 0) if parallel.replicate > 1 else (0, in_shards)
        settled = StateBytes(0, 0, 0, 2 * stored + moments)
        forward = StateBytes(gathered * compute, whole_gradients + early, 0, stored + late + moments)
        return StepBytes(forward, settled, settled)
    optimizer, host = (0, 2 * moments) if parallel.offload == "optimizer" else (moments, 0)
    settled = StateBytes(stored, stored, optimizer, host)
    forward = StateBytes(stored + gathered * compute, whole_gradients + in_shards, optimizer, host)
    return StepBytes(forward, settled, settled)
