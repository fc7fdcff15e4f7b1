"""What a request fixes of the layout: all layouts that are weighed have it, usual or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_llm.config.request import PlanRequest
from dist_llm.config.rules import LAYOUT_RULES
from dist_llm.config.run import RunConfig

SPLITS = ("data", "pipeline", "context", "tensor")
"""Settings whose product must divide the ranks."""


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


FREE = Pins()
"""Nothing is fixed."""


def pins_of(request: PlanRequest) -> Pins:
    """Return what a request fixes of the layout."""
    values = {**request.parallel.model_dump(), "microbatch": request.data.microbatch}
    return Pins({name: value for name, value in values.items() if value is not None})


def filled_sequences(request: PlanRequest) -> int:
    """Return the sequences that fill the data ranks and microbatches that are fixed once."""
    return (request.parallel.data or 1) * (request.data.microbatch or 1)


def key_of(name: str) -> str:
    """Return the key of a setting of the layout by its name."""
    return f"data.{name}" if name == "microbatch" else f"parallel.{name}"


def undivided(pins: Pins, ranks: int) -> dict[str, str]:
    """Return the rule that settings break whose product must divide the ranks, by setting."""
    split = [name for name in SPLITS if name in pins.values]
    product = math.prod(pins.values[name] for name in split)
    words = f"{ranks} devices must be a multiple of {product} = {' x '.join(key_of(name) for name in split)}"
    return dict.fromkeys(split, words) if ranks % product else {}


def broken_rules(draft: RunConfig, ranks: int, pins: Pins) -> dict[str, str]:
    """Return which rule of layouts each setting breaks where a run has what is fixed, and defaults for the rest."""
    layout = {name: value for name, value in pins.values.items() if name not in ("microbatch", "data")}
    parallel = draft.parallel.model_copy(update={"data": None, **layout})
    data = draft.data.model_copy(update={"microbatch": pins.values.get("microbatch", 1)})
    pinned = draft.model_copy(update={"parallel": parallel, "data": data})
    broken = {slip.key: slip.words for rule in reversed(LAYOUT_RULES) for slip in rule(pinned, ranks)}
    found = {name: broken[key_of(name)] for name in pins.values if key_of(name) in broken}
    return undivided(pins, ranks) | found
