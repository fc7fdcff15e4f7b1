"""Config files: a strict, small YAML. What it writes reads back equal, here and in any YAML 1.1 or 1.2 reader.

Mappings, lists, text, numbers, true, false and null; no tags, anchors, aliases, merges or duplicate keys (an alias bomb
is a few lines), no octal `07`, no `no` for false. Read by PyYAML's safe constructors under these narrower rules.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from dist_llm.config.base import Section
from dist_llm.errors import ConfigError, StorageError

MAX_BYTES = 2**20
MAX_DEPTH = 16

_PLAIN_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_YAML_WORDS = frozenset("y n yes no on off true false null".split())


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without the parts of YAML that surprise or that can be used to attack."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own interface)
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not allowed", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag} is not allowed", event.start_mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH}", event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", name.start_mark)
            if name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name.value!r}", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"(?:null|~|)", "n~\0"),
    ("bool", r"(?:true|false)", "tf"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), ["" if c == "\0" else c for c in _first]
    )


class _StrictDumper(yaml.SafeDumper):
    """PyYAML's safe dumper that quotes every text some YAML reader would take for something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote all but plain words and paths."""
    plain = _PLAIN_TEXT.fullmatch(text) is not None and text.lower() not in _YAML_WORDS
    style = None if plain else "'" if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_StrictDumper.add_representer(str, _represent_text)


def read_document(path: Path) -> dict[str, object]:
    """Return the mapping in a YAML file. Raises StorageError if unreadable, ConfigError naming file and line if bad."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            words = "it must name a config file such as runs/<name>/config.yaml"
            raise ConfigError(f"--config {path}: {reason}; {words}") from error
        raise StorageError(f"--config {path}: {reason}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: a config file must not exceed {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}") from error
    return parse_document(text, str(path))


def parse_document(text: str, origin: str) -> dict[str, object]:
    """Return the mapping in YAML text that came from `origin`. Raises ConfigError naming origin and line."""
    try:
        loader = _StrictLoader(text)
        try:
            tree = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{origin}, line {mark.line + 1}" if mark is not None else origin
        raise ConfigError(f"{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not a config file: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: a config file must hold sections such as model: and parallel:")
    return tree


def render_document(config: Section) -> str:
    """Return a config as YAML in the order of its fields; `parse_document` and decoding give an equal config back."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=2**31)
