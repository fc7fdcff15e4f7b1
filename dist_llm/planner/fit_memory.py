"""What makes a config fit into the memory of its devices: single changes and pairs, nearest first, with what they need.

recompute, a smaller microbatch, ZeRO, sequence parallelism      the same ranks do the same work otherwise
tensor, pipeline, context, expert                                 each takes ranks from the data axis
more ranks                                                        where none of these is enough
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

from dist_llm.config.checks import check
from dist_llm.config.rule import value_at, with_values
from dist_llm.config.rules import divisors
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.footprint import GIB, predict_memory

Change = tuple[tuple[str, object], ...]
"""Keys and the values that they are set to."""


@dataclass(frozen=True)
class Remedy:
    """A change after which every rank has enough memory, on so many ranks, and what the worst one then needs."""

    change: Change
    ranks: int
    peak_bytes: int

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.change]
        return f"{' '.join(words)} ({self.peak_bytes / GIB:.1f} GiB)"


def plan_remedies(config: RunConfig, ranks: int, memory_gib: float, most: int = 3) -> list[Remedy]:
    """Return up to `most` ways to fit, those that change the fewest settings first, then those that need the least.

    Empty where neither one change, nor two, nor all that saves memory together with larger axes is enough.
    """
    single = _single_changes(config, ranks)
    pairs = [one + other for one, other in combinations(single, 2)]
    for changes in (single, pairs, _thrifty_changes(config, ranks)):
        tried = (_tried(config, ranks, memory_gib, change) for change in changes)
        found = [remedy for remedy in tried if remedy is not None]
        if found:
            return sorted(found, key=lambda remedy: (_cost(remedy.change), remedy.peak_bytes))[:most]
    return []


def more_ranks(config: RunConfig, ranks: int, memory_gib: float, factor: int = 64) -> Remedy | None:
    """Return the smallest multiple of the ranks, a power of two up to `factor`, on which some change makes it fit."""
    times = 2
    while times <= factor:
        batch = config.data.global_batch
        if config.parallel.data is None and batch % times == 0:
            found = plan_remedies(config, ranks * times, memory_gib, most=1)
            if found:
                return found[0]
        times *= 2
    return None


def say_remedies(config: RunConfig, ranks: int, memory_gib: float) -> list[str]:
    """Return what would fit, in words, the least change first; more ranks where nothing else is enough."""
    found = [str(remedy) for remedy in plan_remedies(config, ranks, memory_gib)]
    if not found and (wider := more_ranks(config, ranks, memory_gib)) is not None:
        found = [f"{wider.ranks} ranks with {wider}"]
    return found


_COST = {"parallel.sequence": 0, "parallel.zero": 1, "data.microbatch": 2, "parallel.recompute": 3}
"""What a change takes from speed, least first; a new size of an axis is dearer than all of these."""


def _cost(change: Change) -> int:
    return sum(_COST.get(key, 5) for key, _ in change)


def _single_changes(config: RunConfig, ranks: int) -> list[Change]:
    """Return what may be changed, one setting at a time."""
    parallel, data = config.parallel, config.data
    found: list[Change] = []
    if parallel.tensor > 1 and not parallel.sequence:
        found.append((("parallel.sequence", True),))
    found += [(("parallel.zero", zero),) for zero in range(parallel.zero + 1, 2 if _only_zero_1(config) else 4)]
    found += [(("data.microbatch", size),) for size in divisors(data.microbatch) if size < data.microbatch]
    ways = {"none": ("selective", "full"), "selective": ("full",), "full": ()}
    found += [(("parallel.recompute", way),) for way in ways[parallel.recompute]]
    for axis in ("tensor", "pipeline", "context", "expert"):
        size = getattr(parallel, axis)
        sizes = [size * times for times in _DOUBLINGS[1:] if size * times <= ranks]
        found += [((f"parallel.{axis}", larger),) for larger in sizes]
    return found


_DOUBLINGS = (1, 2, 4, 8, 16)
"""How much larger an axis may become."""


def _thrifty_changes(config: RunConfig, ranks: int) -> Iterator[Change]:
    """Yield all that saves memory without ranks, with every larger size of tensor and pipeline."""
    parallel = config.parallel
    least = {"parallel.recompute": "full", "data.microbatch": 1, "parallel.zero": 1 if _only_zero_1(config) else 3}
    saving = tuple((key, value) for key, value in least.items() if value_at(config, None, key) != value)
    for pipeline, tensor in product(_DOUBLINGS, _DOUBLINGS):
        if tensor * pipeline * parallel.tensor * parallel.pipeline > ranks:
            continue
        sizes = {"tensor": parallel.tensor * tensor, "pipeline": parallel.pipeline * pipeline}
        axes = tuple((f"parallel.{name}", size) for name, size in sizes.items() if size != getattr(parallel, name))
        sequence = (("parallel.sequence", True),) if sizes["tensor"] > 1 and not parallel.sequence else ()
        yield saving + axes + sequence


def _only_zero_1(config: RunConfig) -> bool:
    return config.engine.name == "megatron"


def _tried(config: RunConfig, ranks: int, memory_gib: float, change: Change) -> Remedy | None:
    """Return the change as a remedy where it is legal and enough."""
    keys = [key for key, _ in change]
    if len(set(keys)) < len(keys):
        return None
    changed = with_values(config, dict(change))
    try:
        found = predict_memory(changed, ranks)
    except (ConfigError, ValueError, ZeroDivisionError):
        return None
    if not found.fits(memory_gib) or any(_new(config, changed, ranks)):
        return None
    return Remedy(change, ranks, found.peak_bytes)


def _new(config: RunConfig, changed: RunConfig, ranks: int) -> Iterator[Violation]:
    """Yield the rules that only the changed config breaks."""
    before = {(violation.key, violation.rule) for violation in check(config, ranks)}
    yield from (each for each in check(changed, ranks) if (each.key, each.rule) not in before)
