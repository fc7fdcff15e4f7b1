"""What would be right instead: the nearest values that break no rule, and the layouts that fit a number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

from dist_llm.config.rule import RANKS, Broken, Rule, value_at, with_value
from dist_llm.config.rules import divisors
from dist_llm.config.run import RunConfig
from dist_llm.config.wording import shown

MOST_SHOWN = 4
MOST_RANKS = 2**20


def legal_values(
    slip: Broken, rule: Rule, rules: Sequence[Rule], config: RunConfig, world_size: int | None
) -> tuple[object, ...]:
    """Return up to four candidates of `slip`, nearest to the present value: numbers ascending, else as proposed.

    A candidate mends `rule` and breaks no rule that held; if some also mend the other slips of that key, only those.
    """
    sharing = [other for other in rules if slip.key in other.keys and other is not rule]
    found = [(other, other(config, world_size)) for other in sharing]
    held = [other for other, slips in found if not slips]
    broken = [other for other, slips in found if any(another.key == slip.key for another in slips)]
    kept: list[object] = []
    best: list[object] = []
    present = value_at(config, world_size, slip.key)
    for candidate in _nearest_first(present, slip.candidates)[:64]:
        changed, ranks = with_value(config, world_size, slip.key, candidate)
        if candidate == present or rule(changed, ranks) or any(other(changed, ranks) for other in held):
            continue
        kept.append(candidate)
        if not any(other(changed, ranks) for other in broken):
            best.append(candidate)
        if len(best) == MOST_SHOWN:
            break
    chosen = (best or kept)[:MOST_SHOWN]
    if all(isinstance(value, int | float) for value in chosen):
        chosen.sort(key=float)  # type: ignore[arg-type]
    return tuple(shown(value) for value in chosen)


def _nearest_first(present: object, candidates: Sequence[object]) -> list[object]:
    """Return candidates without repeats, numbers by their distance from the present value."""
    unique = list(dict.fromkeys(candidates))
    if isinstance(present, int | float) and all(isinstance(value, int | float) for value in unique):
        return sorted(unique, key=lambda value: abs(value - present))  # type: ignore[operator]
    return unique


def fitting_layouts(config: RunConfig, world_size: int, rules: Sequence[Rule], most: int = 3) -> list[str]:
    """Return up to `most` layouts of `world_size` ranks as overrides, those nearest to the asked-for split first.

    None are sought beyond MOST_RANKS: an absurd number must not cost an absurd search.
    """
    asked = config.parallel
    reading = [rule for rule in rules if any(key == RANKS or key.startswith("parallel.") for key in rule.keys)]
    found: list[tuple[int, int, int]] = []
    for tensor in divisors(world_size) if world_size <= MOST_RANKS else ():
        for pipeline in divisors(world_size // tensor):
            data = world_size // (tensor * pipeline)
            update = {"tensor": tensor, "pipeline": pipeline, "data": data}
            if pipeline == 1:
                update["virtual_pipeline"] = 1
            changed = config.model_copy(update={"parallel": asked.model_copy(update=update)})
            if not any(rule(changed, world_size) for rule in reading):
                found.append((tensor, pipeline, data))
    found.sort(key=lambda split: (abs(split[0] - asked.tensor) + abs(split[1] - asked.pipeline), split))
    return [_as_overrides(*split, chunked=asked.virtual_pipeline > 1) for split in found[:most]]


def _as_overrides(tensor: int, pipeline: int, data: int, chunked: bool) -> str:
    """Return a layout as a user types it."""
    chunks = " parallel.virtual_pipeline=1" if chunked and pipeline == 1 else ""
    return f"parallel.tensor={tensor} parallel.pipeline={pipeline}{chunks} parallel.data={data}"
