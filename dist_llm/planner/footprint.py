"""How much memory every rank of a run needs, reckoned before it runs: by component, by stage, by engine.

    allocated   tensors at their most: state, activations, logits, buffers      torch.cuda.max_memory_allocated
    reserved    and what the allocator cannot give, the context, NCCL           nvidia-smi

The native engine's figures are those of `dist-llm plan dry-run`; Megatron-Core's and DeepSpeed's are in closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from dist_llm.accounting.schedules import Pipe
from dist_llm.config.rules import data_ranks, num_microbatches
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.components import Components
from dist_llm.planner.deepspeed_memory import MegatronDeepspeedMemory
from dist_llm.planner.device_memory import DeviceMemory, device_memory
from dist_llm.planner.megatron_memory import MegatronMemory
from dist_llm.planner.native_memory import IN_PLACE, NativeMemory, Release, installed_torch
from dist_llm.planner.practice import is_megatron_deepspeed

GIB = 2**30


class Ranks(Protocol):
    """An engine's memory under a config."""

    def rank(self, index: int, by_stage: bool, /) -> tuple[dict[int, Components], Components]:
        """Return the components of each stage of a pipeline rank, if asked for, and of the rank."""
        ...


@dataclass(frozen=True)
class RankFootprint:
    """One pipeline rank, at index 0 of all other axes, which holds the most; stages: what each of its stages needs."""

    pipeline_rank: int
    components: Components
    stages: dict[int, Components]

    @property
    def peak_bytes(self) -> int:
        """Bytes of the device in use at the most."""
        return self.components.reserved

    @property
    def allocated_bytes(self) -> int:
        """Bytes in tensors at the most."""
        return self.components.allocated


@dataclass(frozen=True)
class Footprint:
    """The memory of all pipeline ranks."""

    ranks: tuple[RankFootprint, ...]

    @property
    def worst(self) -> RankFootprint:
        """The rank that needs the most."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the device in use at the most, on the rank that needs the most."""
        return self.worst.peak_bytes

    @property
    def largest(self) -> str:
        """The component that is the largest on that rank."""
        return self.worst.components.largest

    def fits(self, memory_gib: float) -> bool:
        """Return whether every rank has enough."""
        return self.peak_bytes <= memory_gib * GIB

    def memory_gib(self) -> dict[str, object]:
        """Return, JSON-able and in GiB: the worst rank's peak and components, and those of every rank and stage."""
        worst = self.worst
        return {
            "peak": worst.peak_bytes / GIB,
            "allocated": worst.allocated_bytes / GIB,
            "pipeline_rank": worst.pipeline_rank,
            "largest": worst.components.largest,
            "components": _gib(worst.components),
            "ranks": [
                {
                    "pipeline_rank": rank.pipeline_rank,
                    "peak": rank.peak_bytes / GIB,
                    "allocated": rank.allocated_bytes / GIB,
                    "static": rank.components.static / GIB,
                    "components": _gib(rank.components),
                    "stages": [{"stage": stage, **_gib(rank.stages[stage])} for stage in sorted(rank.stages)],
                }
                for rank in self.ranks
            ],
        }


def _gib(components: Components) -> dict[str, float]:
    return {name: size / GIB for name, size in components.by_name().items()}


def predict_memory(config: RunConfig, ranks: int, release: Release | None = None, by_stage: bool = True) -> Footprint:
    """Return the memory of every pipeline rank of a config on `ranks` ranks, in bytes.

    by_stage: whether to tell the stages of a rank apart. release: of torch, where the native engine runs; None: on CPU
    devices the one that is installed, else 2.15. Before that, pipelines hold buffers of all microbatches of a step.
    Raises ConfigError where the ranks or the batch cannot be dealt out.
    """
    order = range(config.parallel.pipeline)
    return Footprint(tuple(_rank_footprints(config, ranks, release, order, by_stage)))


def fits_memory(config: RunConfig, ranks: int, limit_bytes: float, release: Release | None = None) -> bool:
    """Return whether every rank of a config on `ranks` ranks has enough with so many bytes; one that has not says it.

    The first rank holds the most microbatches and the last the logits: they are asked first.
    """
    last = config.parallel.pipeline - 1
    order = sorted(range(last + 1), key=lambda index: (index not in (0, last), index))
    return all(rank.peak_bytes <= limit_bytes for rank in _rank_footprints(config, ranks, release, order, False))


def _rank_footprints(
    config: RunConfig, ranks: int, release: Release | None, order: Iterable[int], by_stage: bool
) -> Iterator[RankFootprint]:
    """Yield what each of these pipeline ranks needs."""
    if release is None:
        release = installed_torch() if config.cluster.device == "cpu" else IN_PLACE
    pipe, data = _pipe(config, ranks)
    device = device_memory(config)
    memory: Ranks
    if config.engine.name == "megatron":
        memory = MegatronMemory(config, pipe, data)
    elif is_megatron_deepspeed(config):
        memory = MegatronDeepspeedMemory(config, pipe, data)
    else:
        memory = NativeMemory(config, pipe, data, release)
    for index in order:
        stages, whole = memory.rank(index, by_stage)
        yield RankFootprint(index, _on_device(whole, device), stages)


def _on_device(components: Components, device: DeviceMemory) -> Components:
    """Add what a device holds beside tensors of the model."""
    allocated = components.allocated + device.workspace_bytes
    return components.having(
        workspace=device.workspace_bytes,
        fragmentation=int(allocated * device.fragmentation),
        reserve=device.reserve_bytes,
    )


def _pipe(config: RunConfig, ranks: int) -> tuple[Pipe, int]:
    """Return the pipeline of a config and the ranks of its data axis."""
    parallel = config.parallel
    data = data_ranks(config, ranks)
    if data is None:
        words = f"must be whole copies of the model's {parallel.model_ranks} ranks"
        raise ConfigError(
            [Violation("ranks", ranks, words, (max(1, ranks // parallel.model_ranks) * parallel.model_ranks,))]
        )
    count = num_microbatches(config, ranks)
    if count is None:
        unit = data * config.data.microbatch
        words = f"must be whole microbatches on each of {data} data ranks"
        raise ConfigError([Violation("data.global_batch", config.data.global_batch, words, (unit,))])
    schedule = parallel.schedule if parallel.pipeline > 1 else "1f1b"
    return Pipe(schedule, parallel.pipeline, parallel.chunks, count), data
