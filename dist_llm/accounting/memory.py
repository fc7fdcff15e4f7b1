"""Bytes of parameters, gradients and optimizer state that a rank of the native engine holds, at three points of a step.

    W, C  bytes of the master and compute formats;  P  elements of the tp share of this rank's stages
    S     sum over tensors of ceil(rows / shards) x row (FSDP2's allocation);  R  the same for this rank's real rows
    last forward    parameters S W + gathered S shards C  gradients 0, P W or S W  optimizer 2 R W
    before, after the update   S W                             S W                       2 R W

Without FSDP (nothing to shard or cast) S = R = P and nothing is gathered; zero 3 has nothing gathered at the last
forward either. Gradients stay until the next step begins. Rajbhandari et al. 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.accounting.held import HeldTensor, rank_stages, stage_units
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.training import PrecisionConfig

FORMAT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one element."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model state at one point of a step."""

    parameters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Place:
    """One rank's place: on the pp axis, on the shard axis of ZeRO, and that axis's size."""

    pipeline_index: int
    shard_index: int
    shards: int


@dataclass(frozen=True)
class StepBytes:
    """Bytes after the last forward of a step, before the optimizer and after it."""

    last_forward: StateBytes
    before_update: StateBytes
    after_update: StateBytes


def shard_count(parallel: ParallelConfig, data: int) -> int:
    """Return the number of ranks that a parameter is sharded over: 1 for zero 0, else dp x cp / replicate."""
    return 1 if parallel.zero == 0 else data * parallel.context // parallel.replicate


def backwards_before_last_forward(parallel: ParallelConfig, pipeline_index: int, microbatches: int) -> list[int]:
    """Return, for each stage of this pipeline rank, how many backwards it ran before the rank's last forward."""
    pipeline, chunks = parallel.pipeline, parallel.virtual_pipeline
    if pipeline == 1:
        return [microbatches - 1]
    if parallel.schedule == "gpipe":
        return [0]
    if parallel.schedule == "1f1b":
        warmup = min(microbatches, pipeline - pipeline_index)
        return [microbatches - warmup]
    round_size = microbatches // max(1, microbatches // pipeline)
    warmup = (chunks - 1) * round_size + 2 * (pipeline - 1 - pipeline_index)
    done = max(0, chunks * microbatches - 1 - warmup)
    counts = [0] * chunks
    for backward in range(done):
        counts[chunks - 1 - (backward // round_size) % chunks] += 1
    return counts


def _uses_fsdp(parallel: ParallelConfig, precision: PrecisionConfig, shards: int) -> bool:
    return shards > 1 or precision.compute != precision.master


def _waiting_gradients(tensors: list[HeldTensor], parallel: ParallelConfig, place: Place, fsdp: bool) -> int:
    """Return the elements of gradients that wait for later microbatches, once one backward ran."""
    if fsdp and parallel.zero >= 2:
        return sum(tensor.padded_shard_numel(place.shards) for tensor in tensors)
    return sum(tensor.numel for tensor in tensors)


def step_bytes(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, place: Place, microbatches: int
) -> StepBytes:
    """Return the bytes of model state of one rank through a step of `microbatches` microbatches."""
    master, compute = FORMAT_BYTES[precision.master], FORMAT_BYTES[precision.compute]
    fsdp = _uses_fsdp(parallel, precision, place.shards)
    stages = rank_stages(model, parallel, place.pipeline_index)
    by_stage = [[tensor for unit in stage_units(model, parallel, stage) for tensor in unit] for stage in stages]
    tensors = [tensor for held in by_stage for tensor in held]
    shards = sum(tensor.padded_shard_numel(place.shards) for tensor in tensors)
    real = sum(tensor.shard_rows(place.shards, place.shard_index) * tensor.row_numel for tensor in tensors)
    gathered = shards * place.shards if fsdp and parallel.zero < 3 else 0
    backwards = backwards_before_last_forward(parallel, place.pipeline_index, microbatches)
    waiting = sum(
        _waiting_gradients(held, parallel, place, fsdp)
        for held, count in zip(by_stage, backwards, strict=True)
        if count
    )
    settled = StateBytes(shards * master, shards * master, 2 * real * master)
    forward = StateBytes(shards * master + gathered * compute, waiting * master, 2 * real * master)
    return StepBytes(forward, settled, settled)
