"""What a request fixes of the layout: all layouts that are weighed have it, usual or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from dist_llm.config.request import PlanRequest
from dist_llm.config.rules import LAYOUT_RULES
from dist_llm.config.run import RunConfig
from dist_llm.errors import Violation

LONG_ONLY = "context"
"""A setting that is weighed for long sequences alone, and whose other values are tried where it is fixed."""

SPLITS = ("data", "pipeline", "context", "tensor")
"""Settings whose product must divide the ranks."""

FILLING = ("data", "microbatch")
"""Settings that a free batch is a multiple of: another value makes another batch."""

MOST_SHOWN = 3
"""Values that are shown in place of one that leaves no layout."""


@dataclass(frozen=True)
class Pins:
    """Settings of `parallel`, and `microbatch`, by name."""

    values: Mapping[str, Any] = field(default_factory=dict)

    def among(self, name: str, usual: Iterable[Any]) -> tuple[Any, ...]:
        """Return what a setting may be: what it is fixed to, else what is usual."""
        return (self.values[name],) if name in self.values else tuple(usual)

    def allow(self, choice: Mapping[str, Any]) -> bool:
        """Return whether a choice of some settings agrees with what is fixed."""
        return all(self.values.get(name, value) == value for name, value in choice.items())

    def with_(self, name: str, value: Any) -> Pins:
        """Return them with one fixed to another value."""
        return Pins({**self.values, name: value})

    def without(self, *names: str) -> Pins:
        """Return all but some of them."""
        return Pins({key: value for key, value in self.values.items() if key not in names})


FREE = Pins()
"""Nothing is fixed."""

LayoutsLeft = Callable[[Pins], Iterator[RunConfig]]
"""The layouts that some pins leave."""


def pins_of(request: PlanRequest) -> Pins:
    """Return what a request fixes of the layout."""
    values = {**request.parallel.model_dump(), "microbatch": request.data.microbatch}
    return Pins({name: value for name, value in values.items() if value is not None})


def with_pins(request: PlanRequest, pins: Pins) -> PlanRequest:
    """Return a request that fixes just these."""
    layout = {name: pins.values.get(name) for name in type(request.parallel).model_fields}
    data = {"microbatch": pins.values.get("microbatch")}
    sections = {"parallel": request.parallel.model_copy(update=layout), "data": request.data.model_copy(update=data)}
    return request.model_copy(update=sections)


def free_pins(pins: Pins) -> list[Violation]:
    """Return that what is fixed may be left free."""
    return [Violation(_key(name), value, "or leave it free", (None,)) for name, value in pins.values.items()]


def filled_sequences(request: PlanRequest) -> int:
    """Return the sequences that fill the data ranks and microbatches that are fixed once."""
    return (request.parallel.data or 1) * (request.data.microbatch or 1)


def blame_pins(
    pins: Pins, rule: str, layouts_left: LayoutsLeft, broken: Mapping[str, str] | None = None
) -> list[Violation]:
    """Return which pins leave no layout, with values that would; nothing where there is none without them.

    Those are to blame without which there is a layout, each alone; else the fewest that leave one together, with the
    values that they have there. `broken`: which rules of layouts they break, by setting.
    """
    if not pins.values or next(layouts_left(FREE), None) is None:
        return []
    why = broken or {}
    cures = {name: _cures(pins, name, layouts_left) for name in pins.values}
    if any(cures.values()):
        return [
            Violation(_key(name), pins.values[name], _join(rule, why, name), _nearest(pins.values[name], values))
            for name, values in cures.items()
            if values
        ]
    names, config = _together(pins, layouts_left)
    rule = f"{rule} together with {' and '.join(_key(name) for name in names)}" if len(names) > 1 else rule
    return [
        Violation(_key(name), pins.values[name], _join(rule, why, name), (_value(config, name),))
        for name in names
        if _value(config, name) != pins.values[name]
    ]


def broken_rules(draft: RunConfig, ranks: int, pins: Pins) -> dict[str, str]:
    """Return which rule of layouts each setting breaks where a run has what is fixed, and defaults for the rest."""
    layout = {name: value for name, value in pins.values.items() if name not in ("microbatch", "data")}
    parallel = draft.parallel.model_copy(update={"data": None, **layout})
    data = draft.data.model_copy(update={"microbatch": pins.values.get("microbatch", 1)})
    pinned = draft.model_copy(update={"parallel": parallel, "data": data})
    broken = {slip.key: slip.words for rule in reversed(LAYOUT_RULES) for slip in rule(pinned, ranks)}
    found = {name: broken[_key(name)] for name in pins.values if _key(name) in broken}
    split = [name for name in SPLITS if name in pins.values]
    if ranks % (product := math.prod(pins.values[name] for name in split)):
        words = f"{ranks} devices must be a multiple of {product} = {' x '.join(_key(name) for name in split)}"
        found = dict.fromkeys(split, words) | found
    return found


def _join(rule: str, broken: Mapping[str, str], name: str) -> str:
    return f"{rule}: {broken[name]}" if name in broken else rule


def _cures(pins: Pins, name: str, layouts_left: LayoutsLeft) -> set[Any]:
    """Return the values of one pin that leave a layout."""
    found = {_value(config, name) for config in layouts_left(pins.without(name))} - {pins.values[name]}
    if name in FILLING:
        found = {value for value in found if next(layouts_left(pins.with_(name, value)), None) is not None}
    if name == LONG_ONLY:
        near = {2 ** (pins.values[name].bit_length() - 1), 2 ** pins.values[name].bit_length()} - {pins.values[name]}
        found |= {value for value in near if next(layouts_left(pins.with_(name, value)), None) is not None}
    return found


def _together(pins: Pins, layouts_left: LayoutsLeft) -> tuple[tuple[str, ...], RunConfig]:
    """Return the fewest pins without which there is a layout, and the layout."""
    for size in range(2, len(pins.values)):
        for names in combinations(pins.values, size):
            config = next(layouts_left(pins.without(*names)), None)
            if config is not None:
                return names, config
    return tuple(pins.values), next(layouts_left(FREE))


def _key(name: str) -> str:
    return f"data.{name}" if name == "microbatch" else f"parallel.{name}"


def _value(config: RunConfig, name: str) -> Any:
    return config.data.microbatch if name == "microbatch" else getattr(config.parallel, name)


def _nearest(value: Any, others: Iterable[Any]) -> tuple[Any, ...]:
    """Return up to MOST_SHOWN of them, of sizes the nearest in ratio."""

    def apart(other: Any) -> tuple[float, str]:
        sizes = type(value) is int and value and other
        return (abs(math.log(other / value)) if sizes else 0.0), str(other)

    return tuple(sorted(others, key=apart)[:MOST_SHOWN])
