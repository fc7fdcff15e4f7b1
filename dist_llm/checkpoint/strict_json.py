"""JSON without surprises: no duplicate keys, no NaN or infinity, bounded size, nodes and depth.

Python's parser keeps the last of two equal keys, reads `NaN` and turns `1e999` into infinity; a manifest with any of
them is damaged or hostile. Invariant: `parse` raises ValueError and nothing else, whatever the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Never

MAX_NODES = 20_000_000
"""More values than this in one document are refused before parsing (about 100 bytes of memory each)."""
MAX_DEPTH = 32


def dump(tree: object) -> bytes:
    """Return the canonical text of a JSON tree: sorted keys, no spaces, ASCII, finite numbers; ends in a newline."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def parse(raw: bytes) -> object:
    """Return the tree of a JSON text; raise ValueError if it is not unambiguous (`1e999` is left to `plain`)."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES} values")
    try:
        tree: object = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return tree


def plain(value: object, where: str, depth: int = 0) -> object:
    """Return a copy of `value` made of dict, list, str, int, float, bool and None; raise ValueError naming what is not.

    Tuples become lists, mappings dicts. `where` is the path in messages.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}={value} is not finite")
        return value
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{where} is not valid Unicode")
        return value
    if isinstance(value, Mapping):
        return {_key(key, where): plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}, not JSON")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where} has the key {key!r}; JSON keys are strings")
    plain(key, f"a key of {where}")
    return key


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("an object has the same key twice")
    return tree


def _refuse_constant(text: str) -> Never:
    raise ValueError(f"{text} is not JSON")
