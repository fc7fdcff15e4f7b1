"""Which backend computes each op: chosen once, at the start, from what is asked for and what is to be had.

    reference   PyTorch, here in ops/: what every other backend is tested against; always to be had
    native      the compiled library (ops/native.py)
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
from dist_llm.ops.native import missing_ops, native_library

REFERENCE, NATIVE, ONEDNN, AUTO = "reference", "native", "onednn", "auto"
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernels:
    """The backend of each op, by default the reference."""

    rms_norm: str = REFERENCE
    layer_norm: str = REFERENCE
    gelu: str = REFERENCE
    swiglu: str = REFERENCE
    rope: str = REFERENCE
    cross_entropy: str = REFERENCE
    linear: str = REFERENCE


@dataclass(frozen=True)
class NativeOp:
    """What the library must define for an op, on which devices it computes it, and what registers its gradients."""

    names: tuple[str, ...]
    register: Callable[[], None]
    devices: tuple[str, ...] = ("cpu",)


NATIVE_OPS: Mapping[str, NativeOp] = MappingProxyType(
    {
        "rms_norm": NativeOp(rms_norm.NATIVE_OPS, rms_norm.register_native),
        "layer_norm": NativeOp(layer_norm.NATIVE_OPS, layer_norm.register_native),
        "gelu": NativeOp(gelu.NATIVE_OPS, gelu.register_native),
        "swiglu": NativeOp(swiglu.NATIVE_OPS, swiglu.register_native),
        "rope": NativeOp(rope.NATIVE_OPS, rope.register_native),
        "cross_entropy": NativeOp(cross_entropy.NATIVE_OPS, cross_entropy.register_native),
    }
)

PREFERRED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"cpu": dict.fromkeys(("rms_norm", "gelu", "swiglu", "rope", "cross_entropy"), NATIVE)}
)
"""By kind of device, what `auto` takes for each op: what was measured to be fastest (kernels/*/README.md)."""

ONEDNN_PROCESSORS = (("AuthenticAMD", "AVX512"),)
"""Makers and widest vectors of the processors on which `auto` takes oneDNN's products: torch's BLAS there is MKL, which
computes with half of the vector (kernels/linear/README.md)."""

AUTO_DTYPES = (torch.float32,)
"""Formats in which `auto` takes anything but the reference. A CPU is some 45 times slower in bf16 and fp16: such runs
stand for those on a GPU, whose memory the dry run foretells by the reference."""


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
    missing = missing_ops(NATIVE_OPS[op].names)
    if missing:
        return f"{library.path} is of another version: it has no {', '.join(missing)}"
    _register(op)
    return None


@cache
def _register(op: str) -> None:
    """Register an op with torch: once, for a process cannot take that back."""
    NATIVE_OPS[op].register()


def _problem(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Say why a backend cannot compute an op on a device in a format, None where it can."""
    if backend == REFERENCE:
        return None
    if backend == ONEDNN:
        return _onednn_problem(device, dtype)
    if device not in NATIVE_OPS[op].devices:
        return f"native {op} is for {', '.join(NATIVE_OPS[op].devices)} alone, not {device}"
    if dtype not in NATIVE_DTYPES:
        return f"native kernels compute fp32, bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    return native_problem(op)


def _onednn_problem(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu" or dtype != torch.float32:
        return f"oneDNN multiplies on a CPU in fp32, not on {device} in {str(dtype).removeprefix('torch.')}"
    has_it: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return None if has_it else "this torch has no oneDNN"


def _preferred(op: str, device: str, dtype: torch.dtype, maker: str) -> str:
    """Return what `auto` takes for an op."""
    if dtype not in AUTO_DTYPES:
        return REFERENCE
    if op == "linear" and _onednn_problem(device, dtype) is None:
        return ONEDNN if (maker, torch.backends.cpu.get_cpu_capability()) in ONEDNN_PROCESSORS else REFERENCE
    return PREFERRED.get(device, {}).get(op, REFERENCE)


def choose_kernels(
    wanted: Mapping[str, str], required: bool, device: str, dtype: torch.dtype, maker: str = ""
) -> Choice:
    """Return the backend of each op for a kind of device and the format of activations; wanted: by op, or `auto`.

    maker: the processor's, as it calls itself. What cannot be had falls back to the reference; with `required` that
    raises ConfigError, which names each.
    """
    kernels, fallbacks = Kernels(), {}
    for name in (field.name for field in fields(Kernels)):
        asked = wanted.get(name, AUTO)
        backend = _preferred(name, device, dtype, maker) if asked == AUTO else asked
        problem = _problem(name, backend, device, dtype)
        if problem is None:
            kernels = replace(kernels, **{name: backend})
        else:
            fallbacks[name] = problem
    if required and fallbacks:
        raise ConfigError(
            [
                Violation(f"kernels.{name}", wanted.get(name, AUTO), f"cannot be had: {why}", (REFERENCE,))
                for name, why in fallbacks.items()
            ]
        )
    return Choice(kernels, MappingProxyType(fallbacks))
