"""What a config may be, as documents made from the code: every setting, the JSON schema, the rules between settings.

What a setting means is the string under its field. The strings are read from the source here, when a document is
asked for, and not by pydantic: that would cost every start, and an error in a config is to be told at once.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dist_llm.config.base import Section
from dist_llm.config.checks import RULES, SECTION_RULES
from dist_llm.config.engine_rules import ENGINE_RULES
from dist_llm.config.keys import all_fields, nested_section
from dist_llm.config.rule import Rule
from dist_llm.config.rules import LAYOUT_RULES
from dist_llm.config.run import RunConfig

_RULES_PAGE = """\
# Rules that settings keep together

Written by `dist-llm config rules --markdown` from `dist_llm/config/rules.py` and `dist_llm/config/checks.py`; a test
keeps this page equal to them. Every config is checked against all of these before anything is allocated, and all that
is wrong is said at once. Each violation names the setting, its value, the rule and the nearest values that break none:

```
parallel.tensor=6 must divide model.num_heads=32 and model.num_kv_heads=8; use 1, 2, 4 or 8
```

A rule is skipped while it cannot be judged: `ranks` is the number of processes that were started, which a config alone
does not know.
"""

_SETTINGS_PAGE = """\
# Settings

Written by `dist-llm config settings --markdown` from the sections in `dist_llm/config/`; a test keeps this page equal
to them. Any setting can be given on the command line:

```sh
dist-llm train model=llama-tiny run.steps=500 optimizer.lr=1e-3 --cfg
```

A default holds where neither the command line nor a preset under `conf/` gives a value; presets give those that are
required. `--cfg` prints the values that a run resolves to. A whole number is at most 2^31 - 1 where no other bound is
named. What settings must keep together: [rules](layout-rules.md).
"""

_LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Setting:
    """One setting: its key, what it takes in words, its default (none when required) and what it means."""

    key: str
    takes: str
    required: bool
    default: Any
    description: str

    @property
    def spelled_default(self) -> str:
        """The default as a user writes it."""
        return "required" if self.required else _spelled(self.default)

    def __str__(self) -> str:
        default = "required" if self.required else f"default {self.spelled_default}"
        return f"{self.key}: {self.takes} ({default})\n    {self.description}"

    def as_json(self) -> dict[str, object]:
        """Return the setting as plain JSON values; a required one has no default."""
        default = {} if self.required else {"default": self.default}
        return {
            "key": self.key,
            "takes": self.takes,
            "required": self.required,
            **default,
            "description": self.description,
        }


def sections() -> dict[str, type[Section]]:
    """Return every section by its key, the whole config first, with an empty key."""
    nested = {key: nested_section(field) for key, field in all_fields().items()}
    return {"": RunConfig, **{key: section for key, section in nested.items() if section is not None}}


def field_descriptions(section: type[Section]) -> dict[str, str]:
    """Return the string under each field of a section's source."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value.value if isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                found[field.target.id] = " ".join(text.split())
    return found


def json_schema() -> dict[str, object]:
    """Return the JSON schema of a config file (`runs/<name>/config.yaml`), each setting with its description."""
    tree = RunConfig.model_json_schema()
    for section in sections().values():
        properties = _part(tree, section)["properties"]
        for name, text in field_descriptions(section).items():
            # Beside a $ref too: keywords next to it count since the draft of 2019-09.
            properties[name]["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def list_settings(text: str = "") -> tuple[Setting, ...]:
    """Return the settings whose key or description contains `text`, in either case, section by section."""
    wanted = text.casefold()
    return tuple(s for s in _settings() if wanted in s.key.casefold() or wanted in s.description.casefold())


def _settings() -> Iterator[Setting]:
    """Yield every setting."""
    tree = RunConfig.model_json_schema()
    for key, section in sections().items():
        part, descriptions = _part(tree, section), field_descriptions(section)
        for name, field in section.model_fields.items():
            if nested_section(field) is None:
                node = part["properties"][name]
                yield Setting(
                    key=f"{key}.{name}" if key else name,
                    takes=_taken(node),
                    required="default" not in node,
                    default=node.get("default"),
                    description=descriptions.get(name, ""),
                )


def _part(tree: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Return the part of the whole config's schema that describes a section."""
    part: dict[str, Any] = tree if section is RunConfig else tree["$defs"][section.__name__]
    return part


def _taken(node: Mapping[str, Any]) -> str:
    """Say in words what a schema's node admits."""
    if "anyOf" in node:
        return ", or ".join(_taken(member) for member in node["anyOf"])
    if "const" in node:
        return f"only {_spelled(node['const'])}"
    if "enum" in node:
        *others, last = (_spelled(choice) for choice in node["enum"])
        return f"{', '.join(others)} or {last}"
    if node["type"] == "array" and "items" in node:
        return f"list of one or more, each {_taken(node['items'])}"
    if node["type"] == "array":
        each = dict.fromkeys(_taken(member) for member in node["prefixItems"])
        return f"list of {len(node['prefixItems'])}, each a {' or '.join(each)}"
    if node["type"] == "string":
        longest = f", at most {node['maxLength']} characters" if "maxLength" in node else ""
        # What the type itself says, such as `a path: at least one character`, begins with its name.
        named = str(node.get("description", "")).partition(":")[0].removeprefix("a ")
        return named or f"text{longest}"
    plain = {"integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}
    return plain[node["type"]] + _bounds(node)


def _bounds(node: Mapping[str, Any]) -> str:
    """Say in words between which numbers a number lies."""
    words = []
    if "minimum" in node:
        words.append(f" from {node['minimum']}")
    if "exclusiveMinimum" in node:
        words.append(f" above {node['exclusiveMinimum']}")
    if node.get("maximum", _LARGEST_COUNT) != _LARGEST_COUNT:
        words.append(f" to {_round(node['maximum'])}" if "minimum" in node else f", at most {_round(node['maximum'])}")
    if "exclusiveMaximum" in node:
        words.append(f", below {_round(node['exclusiveMaximum'])}")
    return "".join(words)


def _round(number: int) -> str:
    """Spell a large power of two as one."""
    power = number.bit_length() - 1
    return f"2^{power}" if power >= 20 and number == 1 << power else str(number)


def _spelled(value: object) -> str:
    """Spell a value as a user writes it."""
    return value if isinstance(value, str) and value else json.dumps(value)


def settings_page() -> str:
    """Return `docs/reference/settings.md`, a table for each section."""
    found = list_settings()
    parts = [_SETTINGS_PAGE]
    for key, section in sections().items():
        own = [setting for setting in found if setting.key.rpartition(".")[0] == key]
        rows = [f"| `{s.key}` | {s.takes} | {_default_cell(s)} | {s.description} |" for s in own]
        head = ["| Setting | Takes | Default | Means |", "|---|---|---|---|"]
        intro = (section.__doc__ or "").partition("\n")[0]
        parts.append("\n".join([f"## {key or 'The whole run'}", "", intro, "", *head, *rows, ""]))
    return "\n".join([*parts, f"{len(found)} settings.\n"])


def _default_cell(setting: Setting) -> str:
    """Return the table cell of a default."""
    return setting.spelled_default if setting.required else f"`{setting.spelled_default}`"


def rules_page() -> str:
    """Return `docs/reference/layout-rules.md`, three tables."""
    parts = [_RULES_PAGE, _rules_table("Which layouts are legal", LAYOUT_RULES)]
    parts.append(_rules_table("What other engines cannot do", ENGINE_RULES))
    return "\n".join([*parts, _rules_table("Other sections", SECTION_RULES), f"{len(RULES)} rules.\n"])


def _rules_table(title: str, rules: Sequence[Rule]) -> str:
    """Return one table of rules."""
    rows = [f"| `{rule.name}` | {rule.statement} | {', '.join(f'`{key}`' for key in rule.keys)} |" for rule in rules]
    return "\n".join([f"## {title}", "", "| Rule | Says | Reads |", "|---|---|---|", *rows, ""])
