"""Words for what pydantic found: the rule of a setting and the nearest legal value, in the voice of our own rules."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dist_llm.errors import Violation

_BOUNDS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}

_KINDS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "is not a switch",
    "string_type": "must be text",
    "string_unicode": "must be valid Unicode text",
    "finite_number": "must be finite",
    "missing": "must be given",
    "model_type": "must be a section of settings",
    "dict_type": "must be a section of settings",
    "tuple_type": "must be a list",
    "too_long": "has too many values",
    "string_too_short": "must not be empty",
}


def shown(value: object, limit: int = 80) -> object:
    """Return a value as a message may show it: short and printable on one line; numbers as they are."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 10**limit else "a number of many digits"
    listed = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    text = "[" + ",".join(value) + "]" if listed else value if isinstance(value, str) else repr(value)  # type: ignore[arg-type]
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def describe_error(key: str, detail: Mapping[str, Any], field: FieldInfo | None) -> Violation:
    """Return the violation that a pydantic error at `key` says, with the nearest legal values where they are known."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    inside = [part for part in detail["loc"] if isinstance(part, int)]
    key += "".join(f"[{index}]" for index in inside)
    if kind == "missing":
        return Violation(key, None, _KINDS["missing"])
    if kind == "literal_error":
        choices = _choices(field)
        return Violation(key, shown(value), "is not one of its choices", _nearest_first(value, choices))
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        legal = (bound,) if kind.endswith("_equal") and not inside else ()
        return Violation(key, shown(value), f"{words} {bound}", legal)
    if kind == "string_pattern_mismatch" or (kind == "string_too_short" and field is not None and field.description):
        return Violation(key, shown(value), f"must be {_description(field)}")
    if kind == "string_too_long":
        return Violation(key, shown(value), f"must have at most {context['max_length']} characters")
    if kind == "value_error":
        return Violation(key, shown(value), str(context["error"]))
    rule = _KINDS.get(kind, detail["msg"][:1].lower() + detail["msg"][1:])
    return Violation(key, shown(value), rule, () if inside else _same_meaning(kind, value, field))


def _choices(field: FieldInfo | None) -> tuple[object, ...]:
    """Return the choices of a Literal, and of one that may be null those beside it."""
    if field is None:
        return ()
    found: list[object] = []
    for part in get_args(field.annotation):
        found += [None] if part is type(None) else get_args(part) or [part]
    return tuple(found)


def _nearest_first(value: object, choices: tuple[object, ...]) -> tuple[object, ...]:
    """Return the choices with the one that `value` resembles most in front."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.7)
    return tuple(sorted(choices, key=lambda choice: str(choice) not in near))


def _same_meaning(kind: str, value: Any, field: FieldInfo | None) -> tuple[object, ...]:
    """Return what the user surely meant by a value of another type, if that is plain."""
    if kind == "bool_type":
        return ("true", "false")
    if kind not in ("int_type", "float_type") or isinstance(value, bool):
        return ()
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return ()
    if not math.isfinite(number) or abs(number) >= 2**53:
        return ()
    meant: object = round(number) if kind == "int_type" else number
    return (meant,) if _accepts(field, meant) else ()


def _accepts(field: FieldInfo | None, value: object) -> bool:
    """Whether a setting could hold `value`."""
    if field is None:
        return False
    try:
        held: Any = field.annotation
        for constraint in field.metadata:
            held = Annotated[held, constraint]
        TypeAdapter(held).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _description(field: FieldInfo | None) -> str:
    """Return what a text setting may hold."""
    return field.description if field is not None and field.description else "text of another form"
