"""Tables of text on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of the same keys as aligned lines under a heading: the first column to the left, others right."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = row
        return "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()

    return "\n".join(map(line, cells))
