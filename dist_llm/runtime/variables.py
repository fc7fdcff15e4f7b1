"""Environment variables that a library reads, lent to it for as long as it reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def lend_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block, and give each its former value, or none, back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def keep_variables() -> Iterator[None]:
    """Give all environment variables their former values back after the block: importing a library may set some."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
