"""Layouts of a model on so many ranks, the fastest that fits first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_llm.accounting.params import num_parameters
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.run import RunConfig
from dist_llm.planner.cost.step import StepTime, node_devices, predict_step
from dist_llm.planner.device_memory import device_memory
from dist_llm.planner.footprint import GIB, Footprint, fits_memory, predict_memory
from dist_llm.planner.native_memory import Release, installed_torch
from dist_llm.planner.pins import FREE, Pins
from dist_llm.planner.proposals import propose_layouts

FULL = 0.95
"""Share of a device's memory that a plan fills at the most."""

MOST_SPARE = 4
"""Pipelines are not weighed that are more than so many times longer than one that fits with nothing recomputed."""

LEAST_BYTES = 12
"""Bytes a parameter that no layout does without: fp32 masters and Adam's moments."""


@dataclass(frozen=True)
class Ranked:
    """A layout as a config, with the time of its step and its memory."""

    config: RunConfig
    memory: Footprint
    step: StepTime

    @property
    def peak_gib(self) -> float:
        """Memory of the fullest device, in GiB."""
        return self.memory.peak_bytes / GIB

    @property
    def name(self) -> str:
        """The layout in the field's short words, as in `tp8 pp2 dp4 zero1 mb1 full`."""
        parallel = self.config.parallel
        sizes = (("tp", parallel.tensor), ("cp", parallel.context), ("pp", parallel.pipeline), ("vpp", parallel.chunks))
        more = (("ep", parallel.expert), ("dp", parallel.data or 1))
        words = [f"{axis}{number}" for axis, number in (*sizes, *more) if number > 1]
        words += [f"zero{parallel.zero}", f"mb{self.config.data.microbatch}"]
        return " ".join([*words, *recompute_words(parallel)])


def recompute_words(parallel: ParallelConfig) -> list[str]:
    """Return what is recomputed: nothing, `full`, `full5` (blocks of each stage), or the operators."""
    if parallel.recompute == "none":
        return []
    if parallel.recompute == "full":
        return [f"full{parallel.recompute_layers or ''}"]
    return ["+".join(parallel.recompute_operators)]


@dataclass(frozen=True)
class Ranking:
    """All proposed layouts that fit, fastest first, and of those that do not the one that needs the least."""

    fitting: tuple[Ranked, ...]
    too_large: Ranked | None
    proposed: int


def rank_layouts(config: RunConfig, ranks: int, pins: Pins = FREE, brief: bool = False) -> Ranking:
    """Weigh what pins leave of the layouts that are worth it for the config's model and batch on `ranks` ranks.

    brief: without the one that needs the least of those that do not fit, and taking that what recomputes most needs it.
    """
    if brief and not may_hold(config, ranks):
        return Ranking((), None, 0)
    weighed = list(_weigh(config, ranks, pins, brief))
    fitting = [ranked for _, ranked in weighed if ranked is not None]
    failing = [each for each, ranked in weighed if ranked is None]
    fitting.sort(key=lambda ranked: (ranked.step.seconds, ranked.peak_gib))
    too_large = None if brief or fitting or not failing else _smallest(failing, ranks, installed_torch())
    return Ranking(tuple(fitting), too_large, len(weighed))


def rank_in_turn(config: RunConfig, ranks: int, pins: Pins = FREE) -> Iterator[Ranked]:
    """Yield the layouts of rank_layouts that fit as they are found, in no order."""
    if may_hold(config, ranks):
        yield from (ranked for _, ranked in _weigh(config, ranks, pins, brief=True) if ranked is not None)


def may_hold(config: RunConfig, ranks: int) -> bool:
    """Return False where no layout fits because even what all have is too much."""
    limit = FULL * config.cluster.memory_gib * GIB
    return LEAST_BYTES * num_parameters(config.model) <= ranks * (limit - device_memory(config).reserve_bytes)


def _weigh(config: RunConfig, ranks: int, pins: Pins, brief: bool) -> Iterator[tuple[RunConfig, Ranked | None]]:
    """Yield each layout that is tried, with its time and memory if it fits."""
    limit, release = FULL * config.cluster.memory_gib * GIB, installed_torch()
    enough: dict[tuple[int, int], int] = {}
    for variants in propose_layouts(config, ranks, node_devices(config.cluster), pins):
        parallel = variants[0].parallel
        share = (parallel.tensor, parallel.context)
        if parallel.pipeline > MOST_SPARE * enough.get(share, parallel.pipeline):
            continue
        if brief and not fits_memory(variants[-1], ranks, limit, release):
            continue
        for each in variants:
            if fits_memory(each, ranks, limit, release):
                memory = predict_memory(each, ranks, release, by_stage=False)
                if each is variants[0]:
                    enough.setdefault(share, parallel.pipeline)
                yield each, Ranked(each, memory, predict_step(each, ranks))
                break
            yield each, None


def _smallest(configs: list[RunConfig], ranks: int, release: Release) -> Ranked:
    """Return the config whose fullest device needs the least."""
    # Backwards: what recomputes more is smaller, and bounds the others sooner.
    best, least = configs[-1], predict_memory(configs[-1], ranks, release, by_stage=False)
    for each in reversed(configs[:-1]):
        if fits_memory(each, ranks, least.peak_bytes - 1, release):
            best, least = each, predict_memory(each, ranks, release, by_stage=False)
    return Ranked(best, least, predict_step(best, ranks))
