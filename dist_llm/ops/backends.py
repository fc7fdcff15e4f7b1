"""What can compute an op, by name, and torch's record of the ops that have kernels of their own.

    torch.ops.dist_llm.<op>.default   the compiled library's        torch.ops.dist_llm.<op>.triton   Triton's
    torch.ops.dist_llm.<op>.transformer_engine   Transformer Engine's

An op's kernels are overloads of one schema, with the same shapes and gradients (register_op in ops/autograd.py): both
may be here at once, and neither takes the other's place in the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

REFERENCE, NATIVE, TRITON, TORCH, ONEDNN, AUTO = "reference", "native", "triton", "torch", "onednn", "auto"
APEX, TRANSFORMER_ENGINE = "apex", "transformer_engine"
WITH_KERNELS = (NATIVE, TRITON, TRANSFORMER_ENGINE)
"""Backends whose kernels are overloads of torch.ops.dist_llm."""


def overload(name: str, backend: str) -> str:
    """Return the name of an op's overload, as schemas have it."""
    return name if backend == NATIVE else f"{name}.{backend}"


def kernel(name: str, backend: str) -> Callable[..., Any]:
    """Return the overload of an op that a backend computes."""
    found: Callable[..., Any] = getattr(getattr(torch.ops.dist_llm, name), "default" if backend == NATIVE else backend)
    return found


@cache
def _fragment() -> torch.library.Library:
    """Return what holds the overloads that are defined from Python, for as long as the process lives."""
    return torch.library.Library("dist_llm", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_overloads(backend: str, schemas: Mapping[str, str]) -> None:
    """Define a backend's overload of each op; once a process. schemas: arguments and results by the op's name."""
    for name, schema in schemas.items():
        _fragment().define(overload(name, backend) + schema)  # type: ignore[no-untyped-call]


def give_kernels(backend: str, kernels: Mapping[str, Callable[..., Any]], keys: tuple[str, ...]) -> None:
    """Let functions compute a backend's overloads under dispatch keys; by the op's name."""
    for name, function in kernels.items():
        for key in keys:
            _fragment().impl(overload(name, backend), function, key)  # type: ignore[no-untyped-call]
