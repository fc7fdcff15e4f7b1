"""What a request fixes of the layout: all layouts that are weighed have it, usual or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from dist_llm.config.request import PlanRequest
from dist_llm.config.run import RunConfig
from dist_llm.errors import Violation

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


def filled_sequences(request: PlanRequest) -> int:
    """Return the sequences that fill the data ranks and microbatches that are fixed once."""
    return (request.parallel.data or 1) * (request.data.microbatch or 1)


def blame_pins(pins: Pins, rule: str, layouts_left: LayoutsLeft) -> list[Violation]:
    """Return which pins leave no layout, with values that would; nothing where there is none without them.

    Those are to blame without which there is a layout, each alone; else the fewest that leave one together, with the
    values that they have there.
    """
    if not pins.values or next(layouts_left(FREE), None) is None:
        return []
    cures = {name: {_value(config, name) for config in layouts_left(pins.without(name))} for name in pins.values}
    if any(cures.values()):
        return [
            Violation(_key(name), pins.values[name], rule, _nearest(pins.values[name], values))
            for name, values in cures.items()
            if values
        ]
    names, config = _together(pins, layouts_left)
    rule = f"{rule} together with {' and '.join(_key(name) for name in names)}" if len(names) > 1 else rule
    return [
        Violation(_key(name), pins.values[name], rule, (_value(config, name),))
        for name in names
        if _value(config, name) != pins.values[name]
    ]


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
