"""Count work in lines of Python: the same on every machine and at any load, which seconds are not.

A loop is seen however it is written, a comprehension too; what one call does inside C is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class Work:
    """How many lines of Python were run."""

    lines: int = 0


@contextmanager
def counted() -> Iterator[Work]:
    """Count the lines that this thread runs in functions entered in the body, errors or not.

    RuntimeError when the interpreter stopped telling: it does when the recursion limit is met while it does.
    """
    work = Work()

    def count(_frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
        if event == "line":
            work.lines += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield work
    finally:
        lost = sys.gettrace() is not count
        sys.settrace(before)
        if lost:
            raise RuntimeError("not all lines were counted")
