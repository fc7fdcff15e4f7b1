"""Time each op with a choice of backends: all that load here, eager PyTorch, and torch.compile of that.

    of each op and number of threads:   round 1: eager, inductor, native ...   round 2: eager, inductor, native ...

Variants take turns, so that noise of the machine hits all alike; the least time of all rounds counts. Memory is kept as
in a run's ranks (runtime/process.py): a fresh page costs as much as an op.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from dist_llm.ops.backends import TRITON
from dist_llm.ops.gelu import bias_gelu, gelu
from dist_llm.ops.layer_norm import add_layer_norm, layer_norm
from dist_llm.ops.native import native_library
from dist_llm.ops.registry import BACKENDS, Place, backend_problem
from dist_llm.ops.rms_norm import add_rms_norm, rms_norm
from dist_llm.ops.rope import inverse_frequencies, rotate, rotate_pair, rotation_table
from dist_llm.ops.swiglu import swiglu
from dist_llm.parallel.cross_entropy import cross_entropy_sum
from dist_llm.runtime.device import device_name
from dist_llm.runtime.mesh import Axis
from dist_llm.runtime.process import prepare_rank

EPS = 1e-5
TOKENS, WIDTH, VOCABULARY = 2048, 384, 8192
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Timed:
    """An op by its name in the registry, the shapes of its inputs, PyTorch's function, and ours of a backend."""

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    eager: Callable[..., Outputs]
    ours: Callable[..., Outputs]


def _rms(x: Tensor, w: Tensor) -> Outputs:
    return (functional.rms_norm(x, w.shape, w, EPS),)


def _add_rms(x: Tensor, residual: Tensor, w: Tensor) -> Outputs:
    total = x + residual
    return functional.rms_norm(total, w.shape, w, EPS), total


def _layer(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    return (functional.layer_norm(x, w.shape, w, b, EPS),)


def _add_layer(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Outputs:
    total = x + residual
    return functional.layer_norm(total, w.shape, w, b, EPS), total


def _gelu(x: Tensor) -> Outputs:
    return (functional.gelu(x, approximate="tanh"),)


def _bias_gelu(x: Tensor, b: Tensor) -> Outputs:
    return (functional.gelu(x + b, approximate="tanh"),)


def _swiglu(gate: Tensor, up: Tensor) -> Outputs:
    return (functional.silu(gate) * up,)


def _ours(function: Callable[..., Tensor], *rest: Any) -> Callable[..., Outputs]:
    """Return a function of (backend, inputs) that calls an op of one result."""
    return lambda backend, *inputs: (function(*inputs, *rest, backend),)


INNER, GATED, HEADS = (TOKENS, 4 * WIDTH), (TOKENS, 1024), (8, 256, 6, 64)
ROWS, VECTOR, LOGITS = (TOKENS, WIDTH), (WIDTH,), (TOKENS, VOCABULARY)
ALONE = Axis("tp", ProcessGroup(0, 1), 0, 1)  # type: ignore[call-arg]


def _timed_rope(device: torch.device) -> Timed:
    cos, sin = (x.float().to(device) for x in rotation_table(inverse_frequencies(64, 1e4), 256, 1.0))

    def eager(query: Tensor, key: Tensor) -> Outputs:
        return rotate(query, cos, sin), rotate(key, cos, sin)

    return Timed("rope", "rope", (HEADS, HEADS), eager, lambda backend, q, k: rotate_pair(q, k, (cos, sin), backend))


def _timed_cross_entropy(device: torch.device) -> Timed:
    targets = torch.arange(TOKENS, device=device) * 7919 % VOCABULARY

    def eager(logits: Tensor) -> Outputs:
        return (functional.cross_entropy(logits, targets),)

    def ours(backend: str, logits: Tensor) -> Outputs:
        # A view: the gradient is not written over a leaf. From then on the logits of all variants are small numbers.
        total = cross_entropy_sum(logits.view(1, TOKENS, VOCABULARY), targets[None], VOCABULARY, ALONE, backend)
        return (total / TOKENS,)

    return Timed("cross_entropy", "cross_entropy", (LOGITS,), eager, ours)


def timed_ops(device: torch.device) -> tuple[Timed, ...]:
    """Return the ops that are timed, with their constants on a device."""
    return (
        Timed("rms_norm", "rms_norm", (ROWS, VECTOR), _rms, _ours(rms_norm, EPS)),
        Timed(
            "add_rms_norm",
            "rms_norm",
            (ROWS, ROWS, VECTOR),
            _add_rms,
            lambda backend, x, residual, w: add_rms_norm(x, residual, w, EPS, backend),
        ),
        Timed("layer_norm", "layer_norm", (ROWS, VECTOR, VECTOR), _layer, _ours(layer_norm, EPS)),
        Timed(
            "add_layer_norm",
            "layer_norm",
            (ROWS, ROWS, VECTOR, VECTOR),
            _add_layer,
            lambda backend, x, residual, w, b: add_layer_norm(x, residual, (w, b), EPS, backend),
        ),
        Timed("gelu", "gelu", (INNER,), _gelu, _ours(gelu)),
        Timed("bias_gelu", "gelu", (INNER, (4 * WIDTH,)), _bias_gelu, _ours(bias_gelu)),
        Timed("swiglu", "swiglu", (GATED, GATED), _swiglu, _ours(swiglu)),
        _timed_rope(device),
        _timed_cross_entropy(device),
    )


TIMED = tuple(timed.name for timed in timed_ops(torch.device("meta")))
"""What can be timed."""


def bench_kernels(
    ops: Sequence[str], threads: Sequence[int], rounds: int, report: Callable[[str], None], kind: Literal["cpu", "cuda"]
) -> dict[str, Any]:
    """Return where and what was measured, and a row for each op, number of threads and pass: seconds by variant.

    ops: names of `TIMED`. Variants are eager, inductor and the backends that load here; native is None where it does
    not. On a GPU the number of threads is the host's.
    """
    rows = []
    for count in threads:
        device = prepare_rank(kind, 1, count, 0)
        for timed in (timed for timed in timed_ops(device) if timed.name in ops):
            report(f"{timed.name}, {count} thread{'s' * (count > 1)}")
            rows += _time_op(timed, count, rounds, device)
    return {
        "processor": device_name(device),
        "isa": native_library().isa or None,
        "torch": torch.__version__,
        "dtype": "fp32",
        "rounds": rounds,
        "rows": rows,
    }


def _backends(op: str, device: torch.device) -> list[str]:
    """Return what else can compute an op on a device; the interpreter of Triton's is no measure of them."""
    place = Place(device.type, torch.float32, widest_row=WIDTH)
    known = [backend for backend in BACKENDS[op] if device.type == "cuda" or backend != TRITON]
    return [backend for backend in known if backend_problem(op, backend, place) is None]


def _time_op(timed: Timed, threads: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows of an op: its forward, and its forward and backward."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in timed.shapes]
    wait = _wait_for if device.type == "cuda" else lambda: None
    torch.compiler.reset()  # its kernels hold the number of threads that they were compiled for
    compiled = torch.compile(timed.eager, fullgraph=True, dynamic=False)
    variants: dict[str, Callable[..., Outputs]] = {"eager": timed.eager, "inductor": compiled}
    variants |= {backend: partial(timed.ours, backend) for backend in _backends(timed.op, device)}
    rows = []
    for name, run in (("forward", _forward), ("forward+backward", _forward_backward)):
        least = dict.fromkeys(variants, float("inf"))
        for function in variants.values():
            run(function, inputs)
        for _ in range(rounds):
            for variant, function in variants.items():
                wait()
                began = time.perf_counter()
                run(function, inputs)
                wait()
                least[variant] = min(least[variant], time.perf_counter() - began)
        seconds = {"native": None, **least}
        rows.append({"op": timed.name, "shape": [*timed.shapes[0]], "threads": threads, "pass": name, **seconds})
    return rows


def _wait_for() -> None:
    torch.accelerator.synchronize()


@torch.no_grad()
def _forward(function: Callable[..., Outputs], inputs: list[Tensor]) -> None:
    function(*inputs)


def _forward_backward(function: Callable[..., Outputs], inputs: list[Tensor]) -> None:
    outputs = function(*inputs)
    torch.autograd.grad(outputs, inputs, [out.detach() for out in outputs])
