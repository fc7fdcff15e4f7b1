"""The most bytes of gradients and of gathered parameters that one stage holds at once, ZeRO by ZeRO.

    zero      gradients                                             gathered parameters
    none      P W, and a bucket on its way where there are replicas  0
    0, 1      P W with more than one microbatch, else as zero 2     P C
    2, 3      S W and one whole unit in W, on its way               P C; under 3 a unit and those gathered ahead

P, S, W, C as in memory.py; `none`: without FSDP (nothing to shard or cast). Offloaded shards count as host memory.
"""

from __future__ import annotations

from dist_llm.accounting.held import Unit, stage_units
from dist_llm.accounting.memory import FORMAT_BYTES, Place, uses_fsdp
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.training import PrecisionConfig


def _numel(unit: Unit) -> int:
    return sum(tensor.numel for tensor in unit)


def gradient_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    place: Place,
    stage: StagePlan,
    replicas: int,
    microbatches: int,
) -> int:
    """Return the most bytes of gradients of a stage, reduced or not; `replicas`: ranks of data x context."""
    master = FORMAT_BYTES[precision.master]
    units = stage_units(model, parallel, stage)
    whole = sum(_numel(unit) for unit in units)
    if not uses_fsdp(parallel, precision, place.shards):
        largest = max(tensor.numel for unit in units for tensor in unit) * master
        bucket = min(whole * master, max(parallel.bucket_mib << 20, largest))
        return whole * master + (bucket if replicas > 1 else 0)
    if parallel.zero < 2 and microbatches > 1:
        return whole * master
    here = parallel.offload != "parameters"
    shards = sum(place.shard_numel(tensor) for unit in units for tensor in unit) if here else 0
    return (shards + max(_numel(unit) for unit in units)) * master


def gathered_bytes(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, place: Place, stage: StagePlan
) -> int:
    """Return the most bytes of whole parameters, in the compute format, beside a stage's stored shards."""
    if not uses_fsdp(parallel, precision, place.shards):
        return 0
    units = [_numel(unit) for unit in stage_units(model, parallel, stage)]
    if parallel.zero < 3:
        return sum(units) * FORMAT_BYTES[precision.compute]
    windows = [sum(units[start : start + 1 + parallel.prefetch]) for start in range(len(units))]
    return max(windows) * FORMAT_BYTES[precision.compute]
