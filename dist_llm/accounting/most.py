"""The most bytes of gradients and of gathered parameters that one stage holds at once, ZeRO by ZeRO.

    zero      gradients                                             gathered parameters
    0, none   P W                                                   0
    0, 1      P W with more than one microbatch, else as zero 2     P C
    2, 3      S W and one whole unit in W, on its way               P C; under 3 two units, one gathered ahead

P, S, W, C as in memory.py; `none`: without FSDP (nothing to shard or cast).
"""

from __future__ import annotations

from itertools import pairwise

from dist_llm.accounting.held import Unit, stage_units
from dist_llm.accounting.memory import FORMAT_BYTES, Place
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
    microbatches: int,
) -> int:
    """Return the most bytes of gradients of a stage, reduced or not."""
    master = FORMAT_BYTES[precision.master]
    units = stage_units(model, parallel, stage)
    fsdp = place.shards > 1 or precision.compute != precision.master
    whole = sum(_numel(unit) for unit in units)
    if not fsdp or (parallel.zero < 2 and microbatches > 1):
        return whole * master
    shards = sum(place.shard_numel(tensor) for unit in units for tensor in unit)
    return (shards + max(_numel(unit) for unit in units)) * master


def gathered_bytes(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, place: Place, stage: StagePlan
) -> int:
    """Return the most bytes of whole parameters, in the compute format, beside a stage's stored shards."""
    fsdp = place.shards > 1 or precision.compute != precision.master
    if not fsdp:
        return 0
    units = [_numel(unit) for unit in stage_units(model, parallel, stage)]
    if parallel.zero < 3:
        return sum(units) * FORMAT_BYTES[precision.compute]
    pairs = [sum(pair) for pair in pairwise(units)]
    return max(pairs or units) * FORMAT_BYTES[precision.compute]
