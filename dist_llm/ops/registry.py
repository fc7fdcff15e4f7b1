"""Which backend computes each op: chosen once, at the start, from what is asked for and what is to be had.

    reference   the formula in PyTorch, here in ops/: what every other backend is tested against; always to be had
    torch       torch's own function for the op             native   the compiled library (ops/native.py)
    triton      Triton's kernels (ops/triton)
    apex, transformer_engine   NVIDIA's norms (ops/apex.py, ops/transformer_engine.py)
    onednn      matrix products of torch's oneDNN in place of its BLAS (ops/linear.py)

The choice is a frozen value that is handed down to the modules; nothing is decided at a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType

import torch

from dist_llm.errors import ConfigError, Violation
from dist_llm.ops import cross_entropy, gelu, layer_norm, rms_norm, rope, swiglu
from dist_llm.ops.apex import apex_problem
from dist_llm.ops.backends import (
    APEX,
    AUTO,
    NATIVE,
    ONEDNN,
    REFERENCE,
    TORCH,
    TRANSFORMER_ENGINE,
    TRITON,
    define_overloads,
    give_kernels,
)
from dist_llm.ops.native import missing_ops, native_library
from dist_llm.ops.transformer_engine import KERNELS as TRANSFORMER_ENGINES
from dist_llm.ops.transformer_engine import transformer_engine_problem
from dist_llm.ops.triton.here import is_interpreted, triton_problem

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The formats of kernels: the library's, Triton's and apex's."""


@dataclass(frozen=True)
class Kernels:
    """The backend of each op; by default what is always to be had: torch's own function where it is one kernel."""

    rms_norm: str = REFERENCE
    layer_norm: str = TORCH
    gelu: str = TORCH
    swiglu: str = REFERENCE
    rope: str = REFERENCE
    cross_entropy: str = REFERENCE
    linear: str = REFERENCE


@dataclass(frozen=True)
class Place:
    """What ops are computed on: the kind of device, the format of activations, and the widest row that is normed.

    vocabulary_ranks: among how many ranks the logits' columns are dealt out. compiled: whether inductor compiles the
    blocks. maker: the processor's, as it calls itself.
    """

    device: str
    dtype: torch.dtype
    widest_row: int = 0
    vocabulary_ranks: int = 1
    compiled: bool = False
    maker: str = ""


@dataclass(frozen=True)
class CustomOp:
    """An op of torch.ops.dist_llm: its schemas, what registers their gradients, and where the library computes it."""

    schemas: Mapping[str, str]
    register: Callable[[str], None]
    devices: tuple[str, ...] = ("cpu",)


CUSTOM_OPS: Mapping[str, CustomOp] = MappingProxyType(
    {
        "rms_norm": CustomOp(rms_norm.SCHEMAS, rms_norm.register),
        "layer_norm": CustomOp(layer_norm.SCHEMAS, layer_norm.register),
        "gelu": CustomOp(gelu.SCHEMAS, gelu.register),
        "swiglu": CustomOp(swiglu.SCHEMAS, swiglu.register),
        "rope": CustomOp(rope.SCHEMAS, rope.register),
        "cross_entropy": CustomOp(cross_entropy.SCHEMAS, cross_entropy.register),
    }
)

BACKENDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "rms_norm": (REFERENCE, NATIVE, TRITON, TORCH, APEX, TRANSFORMER_ENGINE),
        "layer_norm": (REFERENCE, NATIVE, TRITON, TORCH, APEX, TRANSFORMER_ENGINE),
        "gelu": (REFERENCE, NATIVE, TRITON, TORCH),
        "swiglu": (REFERENCE, NATIVE, TRITON),
        "rope": (REFERENCE, NATIVE, TRITON),
        "cross_entropy": (REFERENCE, NATIVE, TRITON, TORCH),
        "linear": (REFERENCE, ONEDNN),
    }
)
"""By op, what can be asked for."""

PREFERRED: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "cpu": dict.fromkeys(("rms_norm", "gelu", "swiglu", "rope", "cross_entropy"), (NATIVE,)),
        "cuda": {
            "rms_norm": (TRITON, TORCH),
            **dict.fromkeys(("layer_norm", "swiglu", "rope", "cross_entropy"), (TRITON,)),
        },
    }
)
"""By kind of device, what `auto` takes for each op, the first that is to be had. On a CPU what was measured to be
fastest; on a GPU what moves the fewest bytes, which nobody measured yet (kernels/*/README.md)."""

AUTO_DTYPES: Mapping[str, tuple[torch.dtype, ...]] = MappingProxyType({"cpu": (torch.float32,), "cuda": KERNEL_DTYPES})
"""Formats in which `auto` takes anything but the default. A CPU is some 45 times slower in bf16 and fp16: such runs
stand for those on a GPU, whose memory the dry run foretells by the reference."""

IN_BLOCKS = ("rms_norm", "layer_norm", "gelu", "swiglu", "rope")
"""Ops of the blocks, which torch.compile compiles."""

ONEDNN_PROCESSORS = (("AuthenticAMD", "AVX512"),)
"""Makers and widest vectors of the processors on which `auto` takes oneDNN's products: torch's BLAS there is MKL, which
computes with half of the vector (kernels/linear/README.md)."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and for each op that got another backend than it was to have, why."""

    kernels: Kernels
    fallbacks: Mapping[str, str]

    def __str__(self) -> str:
        """Return one line: the ops of each backend, and why not another."""
        chosen = vars(self.kernels)
        isa = f" ({native_library().isa})" if NATIVE in chosen.values() else ""
        parts = []
        for backend in dict.fromkeys(chosen.values()):
            names = ", ".join(name for name, value in chosen.items() if value == backend)
            parts.append(f"{backend}{isa if backend == NATIVE else ''}: {names}")
        why = "; ".join(dict.fromkeys(self.fallbacks.values()))
        return "kernels: " + "; ".join(parts) + (f" ({why})" if why else "")


@cache
def native_problem(op: str) -> str | None:
    """Say why the native backend of an op is not to be had here, None where it is; loads and registers it once."""
    library = native_library()
    if library.problem is not None:
        return f"there is no native library: {library.problem}"
    missing = missing_ops(CUSTOM_OPS[op].schemas)
    if missing:
        return f"{library.path} is of another version: it has no {', '.join(missing)}"
    _register_native(op)
    return None


@cache
def _register_native(op: str) -> None:
    """Register an op with torch: once, for a process cannot take that back."""
    CUSTOM_OPS[op].register(NATIVE)


@cache
def _register_triton(op: str) -> None:
    """Define Triton's overloads of an op, their gradients and their kernels: once, as above."""
    from dist_llm.ops.triton.kernels import KERNELS

    define_overloads(TRITON, CUSTOM_OPS[op].schemas)
    CUSTOM_OPS[op].register(TRITON)
    give_kernels(TRITON, KERNELS[op], ("CPU", "CUDA") if is_interpreted() else ("CUDA",))


@cache
def _register_transformer_engine(op: str) -> None:
    """Define Transformer Engine's overloads of an op, their gradients and their kernels: once, as above."""
    define_overloads(TRANSFORMER_ENGINE, CUSTOM_OPS[op].schemas)
    CUSTOM_OPS[op].register(TRANSFORMER_ENGINE)
    give_kernels(TRANSFORMER_ENGINE, TRANSFORMER_ENGINES[op], ("CUDA",))


def backend_problem(op: str, backend: str, place: Place) -> str | None:
    """Say why a backend cannot compute an op at a place, None where it can; loads and registers what it needs, once."""
    if backend == REFERENCE:
        return None
    problem: str | None = _PROBLEMS[backend](op, place)
    return problem


def _format_problem(whose: str, place: Place) -> str | None:
    if place.dtype in KERNEL_DTYPES:
        return None
    return f"{whose} kernels compute fp32, bf16 and fp16, not {str(place.dtype).removeprefix('torch.')}"


def _torch_problem(op: str, place: Place) -> str | None:
    if op == "cross_entropy" and place.vocabulary_ranks > 1:
        return f"torch's cross_entropy needs the whole vocabulary, which {place.vocabulary_ranks} ranks share"
    return None


def _native_problem(op: str, place: Place) -> str | None:
    devices = CUSTOM_OPS[op].devices
    if place.device not in devices:
        return f"native {op} is for {', '.join(devices)} alone, not {place.device}"
    return _format_problem("native", place) or native_problem(op)


def _triton_problem(op: str, place: Place) -> str | None:
    problem = _format_problem("triton's", place) or triton_problem(place.device)
    if problem is not None:
        return problem
    from dist_llm.ops.triton.launch import WIDEST_NORM

    if op in ("rms_norm", "layer_norm") and place.widest_row > WIDEST_NORM:
        return f"triton's {op} holds rows of up to {WIDEST_NORM} numbers, not {place.widest_row}"
    _register_triton(op)
    return None


def _apex_problem(op: str, place: Place) -> str | None:
    if place.device != "cuda":
        return f"apex's {op} is for cuda alone, not {place.device}"
    return _format_problem("apex's", place) or apex_problem()


def _transformer_engine_problem(op: str, place: Place) -> str | None:
    if place.device != "cuda":
        return f"Transformer Engine's {op} is for cuda alone, not {place.device}"
    problem = _format_problem("Transformer Engine's", place) or transformer_engine_problem()
    if problem is None:
        _register_transformer_engine(op)
    return problem


def _onednn_problem(op: str, place: Place) -> str | None:
    if place.device != "cpu" or place.dtype != torch.float32:
        kind = str(place.dtype).removeprefix("torch.")
        return f"oneDNN multiplies on a CPU in fp32, not on {place.device} in {kind}"
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return None if there else "this torch has no oneDNN"


_PROBLEMS: Mapping[str, Callable[[str, Place], str | None]] = MappingProxyType(
    {
        TORCH: _torch_problem,
        NATIVE: _native_problem,
        TRITON: _triton_problem,
        APEX: _apex_problem,
        TRANSFORMER_ENGINE: _transformer_engine_problem,
        ONEDNN: _onednn_problem,
    }
)


def _preferred(op: str, place: Place) -> tuple[str, ...]:
    """Return what `auto` would take for an op, best first; nothing where that is the default."""
    if place.dtype not in AUTO_DTYPES.get(place.device, ()):
        return ()
    if op == "linear":
        best = (place.maker, torch.backends.cpu.get_cpu_capability()) in ONEDNN_PROCESSORS
        return (ONEDNN,) if best and _onednn_problem(op, place) is None else ()
    if place.compiled and place.device == "cuda" and op in IN_BLOCKS:
        return ()  # inductor fuses plain operations with what is around them; kernels of ours it must leave alone
    return PREFERRED.get(place.device, {}).get(op, ())


def choose_kernels(wanted: Mapping[str, str], required: bool, place: Place) -> Choice:
    """Return the backend of each op at a place; wanted: by op, or `auto`.

    What cannot be had falls back to the next best; with `required` that raises ConfigError, which names each.
    """
    kernels, fallbacks = Kernels(), dict[str, str]()
    for name in (field.name for field in fields(Kernels)):
        asked = wanted.get(name, AUTO)
        for backend in _preferred(name, place) if asked == AUTO else (asked,):
            problem = backend_problem(name, backend, place)
            if problem is None:
                kernels = replace(kernels, **{name: backend})
                break
            fallbacks.setdefault(name, problem)
    if required and fallbacks:
        raise ConfigError(
            [
                Violation(f"kernels.{name}", wanted.get(name, AUTO), f"cannot be had: {why}", (REFERENCE,))
                for name, why in fallbacks.items()
            ]
        )
    return Choice(kernels, MappingProxyType(fallbacks))
