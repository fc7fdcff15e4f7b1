"""The base of every section: frozen, closed to unknown keys, finite numbers only, nothing converted silently.

`07`, `"1"`, `1.0` and `true` are not whole numbers: strict types refuse what YAML and shells make of a slip.
Counts are bounded, so that products of them stay printable and searches over them short.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A frozen config section. Unknown keys, NaN, infinite floats and values of another type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def _refuse_truth(value: object) -> object:
    """Refuse true and false, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A whole number of things, at least one."""

CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""A whole number of things; 0 is none, or off."""

Choice = BeforeValidator(_refuse_truth)
"""Annotates a Literal of numbers."""

PathText = Annotated[
    str,
    Field(
        min_length=1,
        max_length=4096,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        description="a path: at least one character, no control characters",
    ),
]
"""A path as the user wrote it; `~` is expanded where it is opened."""
