"""What a config may be, as documents made from the code: the JSON schema of a config file and the page of rules."""

from __future__ import annotations

from collections.abc import Sequence

from dist_llm.config.checks import RULES, SECTION_RULES
from dist_llm.config.rule import Rule
from dist_llm.config.rules import LAYOUT_RULES
from dist_llm.config.run import RunConfig

_PAGE = """\
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


def json_schema() -> dict[str, object]:
    """Return the JSON schema of a config file (`runs/<name>/config.yaml`)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


def rules_page() -> str:
    """Return `docs/reference/layout-rules.md`, two tables."""
    parts = [_PAGE, _table("Which layouts are legal", LAYOUT_RULES), _table("Other sections", SECTION_RULES)]
    return "\n".join([*parts, f"{len(RULES)} rules.\n"])


def _table(title: str, rules: Sequence[Rule]) -> str:
    """Return one table of rules."""
    rows = [f"| `{rule.name}` | {rule.statement} | {', '.join(f'`{key}`' for key in rule.keys)} |" for rule in rules]
    return "\n".join([f"## {title}", "", "| Rule | Says | Reads |", "|---|---|---|", *rows, ""])
