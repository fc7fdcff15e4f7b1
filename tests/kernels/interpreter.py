"""Runs tests of Triton kernels on CPU tensors, in a process of its own: triton reads its variable once, on import."""

from __future__ import annotations

import importlib
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, wraps
from typing import Any

import torch

from dist_llm.ops.backends import TRITON
from dist_llm.ops.registry import BACKENDS, Place, backend_problem
from dist_llm.runtime.variables import lend_variables

TIMEOUT_SECONDS = 120.0


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Let a test run where kernels are interpreted; a launch costs 2 to 4 ms a program, so at most 50 of them."""

    @wraps(test)
    def run(**arguments: Any) -> None:
        run_interpreted(test, arguments)

    return run


def run_interpreted(test: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Run what a decorator of the test wraps where kernels are interpreted."""
    _worker().submit(_run, test.__module__, test.__name__, arguments).result(TIMEOUT_SECONDS)


@cache
def _worker() -> ProcessPoolExecutor:
    worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with lend_variables({"TRITON_INTERPRET": "1", "CHECK_SHAPES": "1"}):
        worker.submit(_start).result(TIMEOUT_SECONDS)
    return worker


def _start() -> None:
    # The variable is the parent's again as soon as this returns, and triton reads it once.
    importlib.import_module("triton.language")
    torch.set_num_threads(1)
    for op, backends in BACKENDS.items():
        if TRITON in backends:
            problem = backend_problem(op, TRITON, Place("cpu", torch.float32))
            assert problem is None, problem
    # Lanes outside of a mask divide by zero, as they do on a GPU, where nobody is told.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vars(importlib.import_module(module))[name].__wrapped__(**arguments)
