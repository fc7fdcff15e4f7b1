"""A tree of plain values into a frozen section, a `RunConfig` as a rule, with every slip as a violation, not the first.

Invariant: nothing in the tree can name code: keys such as `_target_` and `${...}` interpolations are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from pydantic import ValidationError

from dist_llm.config.base import Section
from dist_llm.config.keys import closest_key, field_at, nested_section
from dist_llm.config.run import RunConfig
from dist_llm.config.wording import describe_error, shown
from dist_llm.errors import ConfigError, Violation

MAX_DEPTH = 16

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Decoded(Generic[S]):
    """What could be read: the config, what was wrong, and the keys (or whole sections) without a usable value.

    With violations `config` is partial: a field named by `unusable` holds its default or, having none, is absent.
    """

    config: S
    violations: tuple[Violation, ...]
    unusable: frozenset[str]


def decode(tree: Mapping[str, object]) -> RunConfig:
    """Return the config that `tree` holds. Raises ConfigError with every slip in a single setting."""
    decoded = decode_partly(tree)
    if decoded.violations:
        raise ConfigError(list(decoded.violations))
    return decoded.config


def decode_partly(tree: Mapping[str, object]) -> Decoded[RunConfig]:
    """Return as much of the config as can be read, and what was wrong with the rest."""
    return decode_as(RunConfig, tree)


def decode_as(kind: type[S], tree: Mapping[str, object]) -> Decoded[S]:
    """Return as much of a section of that kind as can be read, and what was wrong with the rest."""
    cleaned: dict[str, Any] = copy.deepcopy(dict(tree))
    unsafe = list(_take_unsafe(cleaned, ()))
    try:
        config = kind.model_validate(cleaned)
    except ValidationError as error:
        details = error.errors(include_url=False)
    else:
        return Decoded(config, tuple(v for _, v in unsafe), frozenset(key for key, _ in unsafe))
    violations = [violation for _, violation in unsafe]
    unusable = {key for key, _ in unsafe}
    for detail in details:
        path = _setting_path(detail)
        key = ".".join(path)
        if detail["type"] == "extra_forbidden":
            violations.extend(_unknown(kind, key, detail["input"]))
        elif key not in unusable:
            violations.append(describe_error(key, detail, field_at(key, kind)))
            unusable.add(key)
        _remove(cleaned, path)
    return Decoded(cast(S, _construct(kind, cleaned)), tuple(violations), frozenset(unusable))


def _setting_path(detail: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the key path of the setting an error is about, cutting positions inside a list off."""
    path: list[str] = []
    for part in detail["loc"]:
        if isinstance(part, int):
            break
        path.append(part)
    return tuple(path)


def _unknown(kind: type[Section], key: str, value: object) -> Iterator[Violation]:
    """Yield the violation of a key that no section has, or of each setting in a section that does not exist."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _unknown(kind, f"{key}.{name}", inner)
        return
    if kind is not RunConfig and field_at(key) is not None:
        rule = "is a setting of a run, not of this command: set it in the run's config"
        yield Violation(str(shown(key)), shown(value), rule)
        return
    near = closest_key(key, kind)
    everything = (
        "dist-llm train --cfg prints them all" if kind is RunConfig else "the help of this command has them all"
    )
    hint = f"did you mean {near}?" if near is not None else everything
    yield Violation(str(shown(key)), shown(value), f"is not a setting: {hint}")


def _take_unsafe(tree: dict[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Violation]]:
    """Remove from `tree` and yield what could name code, or is nested beyond any setting."""
    for name in list(tree):
        key = ".".join((*path, str(name)))
        value = tree[name]
        if not isinstance(name, str) or name.startswith("_"):
            rule = "is refused: keys are names of settings, and no config can name code"
        elif any("${" in text for text in _texts(value)) or "${" in name:
            rule = "is refused: a config has no interpolation, write the value itself"
        elif isinstance(value, dict) and len(path) >= MAX_DEPTH:
            rule = f"is nested deeper than {MAX_DEPTH} sections"
        else:
            if isinstance(value, dict):
                yield from _take_unsafe(value, (*path, name))
            continue
        del tree[name]
        yield key, Violation(str(shown(key)), shown(value), rule)


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a scalar or a (nested) list."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _remove(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    """Remove the value at `path` from nested mappings, if it is there."""
    node: Any = tree
    for name in path[:-1]:
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(path[-1], None)


def _construct(cls: type[Section], tree: dict[str, Any]) -> Section:
    """Return a section from values that are known to be right, leaving out required ones that are absent."""
    values = dict(tree)
    for name, field in cls.model_fields.items():
        section = nested_section(field)
        if section is not None and (name in values or field.is_required()):
            values[name] = _construct(section, values.get(name, {}))
        elif isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return cls.model_construct(**values)
