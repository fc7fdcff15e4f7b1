"""Compiled blocks: torch.compile of the forward of each repeated part, in place, so that names do not change.

All blocks are one piece of code with other weights, so it is compiled once, not once a layer. What cannot be traced is
left out and cuts the graph: layers of experts (sizes depend on the tokens, routers report in their backward), ring
attention (sends and receives) and linears whose weight gradient waits (ops/linear.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from dist_llm.errors import EngineUnavailable

Backend = Literal["inductor", "aot_eager"]


def require_compiler(backend: Backend, device: torch.device) -> None:
    """Raise EngineUnavailable where inductor has no C++ compiler for the kernels of a CPU."""
    if backend != "inductor" or device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise EngineUnavailable(
            "parallel.compile=true with parallel.compile_backend=inductor needs a C++ compiler on a CPU: "
            "put g++ or clang++ on the path or name it in CXX; or use parallel.compile_backend=aot_eager"
        ) from error


def prepare_compile(blocks: Iterable[nn.Module]) -> None:
    """Leave out of the blocks what cannot be traced, in place, before anything is wrapped around it."""
    for block in blocks:
        for module in block.modules():
            _prepare(module)


def apply_compile(blocks: Iterable[nn.Module], backend: Backend) -> None:
    """Compile the forward of each prepared block, in place, at its first call. Its collectives do not change."""
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False)


def _prepare(module: nn.Module) -> None:
    """Leave out what cannot be traced; make a tensor of a number that would have every layer compiled anew."""
    if hasattr(module, "dispatch"):
        module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
    attend = getattr(module, "attend", None)
    if attend is not None and not attend.traceable:
        module.attend = torch.compiler.disable(attend.__call__)  # type: ignore[no-untyped-call]
    key = getattr(module, "key", None)
    if isinstance(key, int):
        module.key = torch.tensor(key)
