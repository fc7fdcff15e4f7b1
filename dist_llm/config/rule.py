"""What a rule is: a named function over the whole config and the number of ranks, and the keys that it reads.

A rule yields a `Broken` for each setting that breaks it and proposes candidates; `legal.py` keeps those that break
nothing. Invariant: a rule reads no key but those it names, so it can be skipped where one of them is unusable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_llm.config.run import RunConfig

RANKS = "ranks"
"""Key of the number of ranks that were started (the world size); None while it is unknown."""


@dataclass(frozen=True)
class Broken:
    """One setting that breaks a rule: how, and values to try in its place."""

    key: str
    words: str
    candidates: tuple[object, ...] = ()


Check = Callable[[RunConfig, int | None], Iterable[Broken]]


@dataclass(frozen=True)
class Rule:
    """A rule across settings. Calling it yields what breaks it; nothing when it holds or cannot be judged yet."""

    check: Check
    keys: tuple[str, ...]

    def __call__(self, config: RunConfig, world_size: int | None) -> list[Broken]:
        """Return every setting that breaks the rule."""
        return list(self.check(config, world_size))

    @property
    def name(self) -> str:
        """Name of the rule, which is its function's."""
        return self.check.__name__

    @property
    def statement(self) -> str:
        """What the rule says, one paragraph: its function's docstring."""
        return " ".join(inspect.cleandoc(self.check.__doc__ or "").split())

    def touches(self, unusable: frozenset[str]) -> bool:
        """Whether the rule reads one of these keys, or a key inside one of these sections."""
        return any(key == bad or key.startswith(bad + ".") for key in self.keys for bad in unusable)


def reads(*keys: str) -> Callable[[Check], Rule]:
    """Make a rule of a function that reads these keys of the config."""
    return lambda check: Rule(check, keys)


def value_at(config: RunConfig, world_size: int | None, key: str) -> Any:
    """Return the value of a setting, or the number of ranks."""
    if key == RANKS:
        return world_size
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node


def with_value(config: RunConfig, world_size: int | None, key: str, value: object) -> tuple[RunConfig, int | None]:
    """Return config and ranks with one setting replaced."""
    if key == RANKS:
        assert value is None or isinstance(value, int)
        return config, value
    return _replaced(config, key.split("."), value), world_size


def with_values(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """Return the config with the settings at some dotted keys replaced."""
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(node: Any, path: list[str], value: object) -> Any:
    """Return a copy of nested sections with the value at `path` replaced."""
    inner = value if len(path) == 1 else _replaced(getattr(node, path[0]), path[1:], value)
    return node.model_copy(update={path[0]: inner})
