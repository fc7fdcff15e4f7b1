"""The most bytes of gradients and of gathered parameters that one stage holds at once, ZeRO by ZeRO.

    zero      gradients                                             gathered parameters
    none      P W, and a bucket on its way where there are replicas  0
    0, 1      P W with more than one microbatch, else as zero 2;    P C
              before torch 2.15 a unit in C beside it where C < W
    2, 3      S W and one whole unit in W, on its way               P C; under 3 what is at work and gathered ahead

P, S, W, C as in memory.py; `none`: without FSDP (nothing to shard or cast). Offloaded shards count as host memory.
"""

from __future__ import annotations

from dist_llm.accounting.held import Unit, stage_units
from dist_llm.accounting.memory import FORMAT_BYTES, Place, uses_fsdp
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.run import RunConfig
from dist_llm.config.training import PrecisionConfig


def _numel(unit: Unit) -> int:
    return sum(tensor.numel for tensor in unit)


def gradient_bytes(
    config: RunConfig, place: Place, stage: StagePlan, replicas: int, microbatches: int, sums_in_place: bool
) -> int:
    """Return the most bytes of gradients of a stage, reduced or not.

    replicas: ranks of data x context. sums_in_place: whether a backward adds to the sums of its unit at once (torch
    2.15) rather than all together when the unit is done.
    """
    model, parallel, precision = config.model, config.parallel, config.precision
    compute, master = FORMAT_BYTES[precision.compute], FORMAT_BYTES[precision.master]
    units = stage_units(model, parallel, stage)
    whole = sum(_numel(unit) for unit in units)
    if not uses_fsdp(parallel, precision, place.shards):
        largest = max(tensor.numel for unit in units for tensor in unit) * master
        bucket = min(whole * master, max(parallel.bucket_mib << 20, largest))
        return whole * master + (bucket if replicas > 1 else 0)
    if parallel.zero < 2 and microbatches > 1:
        narrow = 0 if sums_in_place or compute >= master else max(_numel(unit) for unit in units) * compute
        return whole * master + narrow
    here = parallel.offload != "parameters"
    shards = sum(place.shard_numel(tensor) for unit in units for tensor in unit) if here else 0
    return (shards + max(_numel(unit) + _beside(unit, units) for unit in units)) * master


def _beside(unit: Unit, units: list[Unit]) -> int:
    """Return the elements whose gradients wait while experts are reduced: those of their layer's router and shared."""
    if not unit[0].expert:
        return 0
    layer = unit[0].name.partition(".experts.")[0]
    return sum(
        tensor.numel for other in units for tensor in other if tensor.name.startswith(layer) and not tensor.expert
    )


def gathered_bytes(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, place: Place, stage: StagePlan
) -> int:
    """Return the most bytes of whole parameters, in the compute format, beside a stage's stored shards."""
    if not uses_fsdp(parallel, precision, place.shards):
        return 0
    units = stage_units(model, parallel, stage)
    whole = sum(_numel(unit) for unit in units) if parallel.zero < 3 else _most_gathered(units, parallel, model, stage)
    return whole * FORMAT_BYTES[precision.compute]


def _most_gathered(units: list[Unit], parallel: ParallelConfig, model: ModelConfig, stage: StagePlan) -> int:
    """Return the most elements that are gathered, or on their way, at once under ZeRO 3, as parallel/zero.py has it.

    A tied pair in one stage, the root, stays for as long as the model computes. Experts are gathered beside the rest of
    their blocks. What comes is unpacked: for that moment it is there twice.
    """
    root = _numel(units[-1]) if model.tie_embeddings and stage.first and stage.last else 0
    blocks: list[tuple[int, list[int]]] = []
    experts: list[int] = []
    for unit in units[:-1] if root else units:
        if unit[0].expert:
            experts.append(_numel(unit))
        else:
            blocks.append((_numel(unit), experts))
            experts = []
    most = root
    for way in (blocks, [(size, inner[::-1]) for size, inner in reversed(blocks)]):
        order = [size for block, inner in way for size in (block, *inner)]
        place = 0
        for block, inner in way:
            end = place + 1 + parallel.prefetch
            most = max(most, 2 * block + sum(order[place + 1 : end - 1]), block + sum(order[place + 1 : end]))
            for size in inner:
                place += 1
                most = max(most, block + 2 * size + sum(order[place + 1 : end]))
            place += 1
        most = max(most, sum(order[: parallel.prefetch]))
    return root + most
