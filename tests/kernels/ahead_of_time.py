"""Compiles for GPUs what a launcher launches, without one: arguments are recorded, then specialised as at a launch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

ARCHITECTURES = (80, 90, 100)
REGISTERS = 65536
"""Of a multiprocessor, which a program has to fit into."""
SHARED_BYTES = 99 * 1024
"""What a program may have on every architecture of compute capability 8 and newer."""
_WARP = 32
_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s")


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """File and function of the kernel."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


@dataclass(frozen=True)
class Compiled:
    """What a cubin needs of a GPU, and the text it was assembled from."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    warps: int
    ptx: str

    @property
    def registers_of_a_program(self) -> int:
        """Registers of all threads; a thread is given them in eights."""
        return -(-self.registers // 8) * 8 * _WARP * self.warps

    @property
    def accesses(self) -> tuple[int, int]:
        """Instructions that read or write global memory: 128 bits wide or wider, and narrower."""
        widths = [int(count or 1) * int(bits) for _, count, bits in _ACCESS.findall(self.ptx)]
        wide = sum(width >= 128 for width in widths)
        return wide, len(widths) - wide


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches instead of running them; tensors may be on the meta device."""
    launches: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """Return what a call launches."""
    with recorded_launches() as launches:
        call()
    return launches


def compile_launch(launch: Launch, architecture: int, folder: Path) -> Compiled:
    """Compile for an architecture (80: Ampere, 90: Hopper, 100: Blackwell); the cubin goes to the folder."""
    target = GPUTarget("cuda", architecture, _WARP)
    backend = make_backend(target)
    kernel = launch.kernel
    specialise = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialised, options = specialise(*launch.arguments, **launch.options)
    chosen, signature, constants, attributes = kernel._pack_args(backend, launch.options, bound, specialised, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=vars(chosen))
    cubin = folder / f"{launch.name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    words = [str(tool), "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    facts = (found["REG"], found["STACK"], found["LOCAL"], compiled.metadata.shared)
    return Compiled(*facts, compiled.metadata.num_warps, compiled.asm["ptx"])
