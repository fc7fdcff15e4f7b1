"""Time each op with a choice of backends: what is registered here, eager PyTorch, and torch.compile of that.

    of each op and number of threads:   round 1: eager, inductor, native   round 2: eager, inductor, native   ...

Variants take turns, so that noise of the machine hits all alike; the least time of all rounds counts. Memory is kept as
in a run's ranks (runtime/process.py): a fresh page costs as much as an op.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from dist_llm.ops.backends import NATIVE
from dist_llm.ops.gelu import bias_gelu, gelu
from dist_llm.ops.layer_norm import add_layer_norm, layer_norm
from dist_llm.ops.native import native_library
from dist_llm.ops.registry import native_problem
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
    """An op by its name in the registry, the shapes of its inputs, and the function in PyTorch's words and in ours."""

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    eager: Callable[..., Outputs]
    native: Callable[..., Outputs]


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


def _rope(query: Tensor, key: Tensor) -> Outputs:
    return rotate(query, COS, SIN), rotate(key, COS, SIN)


HEADS = (8, 256, 6, 64)
COS, SIN = (table.float() for table in rotation_table(inverse_frequencies(64, 1e4), 256, 1.0))
INNER, GATED = (TOKENS, 4 * WIDTH), (TOKENS, 1024)
ROWS, VECTOR, LOGITS = (TOKENS, WIDTH), (WIDTH,), (TOKENS, VOCABULARY)
TARGETS = torch.arange(TOKENS) * 7919 % VOCABULARY
ALONE = Axis("tp", ProcessGroup(0, 1), 0, 1)  # type: ignore[call-arg]


def _cross_entropy(logits: Tensor) -> Outputs:
    return (functional.cross_entropy(logits, TARGETS),)


def _native_cross_entropy(logits: Tensor) -> Outputs:
    # A view: the gradient is not written over a leaf. From then on the logits of all variants are small numbers.
    total = cross_entropy_sum(logits.view(1, TOKENS, VOCABULARY), TARGETS[None], VOCABULARY, ALONE, NATIVE)
    return (total / TOKENS,)


TIMED = (
    Timed("rms_norm", "rms_norm", (ROWS, VECTOR), _rms, lambda x, w: (rms_norm(x, w, EPS, NATIVE),)),
    Timed(
        "add_rms_norm",
        "rms_norm",
        (ROWS, ROWS, VECTOR),
        _add_rms,
        lambda x, residual, w: add_rms_norm(x, residual, w, EPS, NATIVE),
    ),
    Timed(
        "layer_norm", "layer_norm", (ROWS, VECTOR, VECTOR), _layer, lambda x, w, b: (layer_norm(x, w, b, EPS, NATIVE),)
    ),
    Timed(
        "add_layer_norm",
        "layer_norm",
        (ROWS, ROWS, VECTOR, VECTOR),
        _add_layer,
        lambda x, residual, w, b: add_layer_norm(x, residual, (w, b), EPS, NATIVE),
    ),
    Timed("gelu", "gelu", (INNER,), _gelu, lambda x: (gelu(x, NATIVE),)),
    Timed("bias_gelu", "gelu", (INNER, (4 * WIDTH,)), _bias_gelu, lambda x, b: (bias_gelu(x, b, NATIVE),)),
    Timed("swiglu", "swiglu", (GATED, GATED), _swiglu, lambda gate, up: (swiglu(gate, up, NATIVE),)),
    Timed("rope", "rope", (HEADS, HEADS), _rope, lambda q, k: rotate_pair(q, k, (COS, SIN), NATIVE)),
    Timed("cross_entropy", "cross_entropy", (LOGITS,), _cross_entropy, _native_cross_entropy),
)


def bench_kernels(
    ops: Sequence[str], threads: Sequence[int], rounds: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Return where and what was measured, and a row for each op, number of threads and pass: seconds by variant.

    ops: names of `TIMED`. inductor is None where it cannot compile here, native where there is no library.
    """
    rows = []
    for count in threads:
        device = prepare_rank("cpu", 1, count, 0)
        for timed in (timed for timed in TIMED if timed.name in ops):
            report(f"{timed.name}, {count} thread{'s' * (count > 1)}")
            rows += _time_op(timed, count, rounds)
    return {
        "processor": device_name(device),
        "isa": native_library().isa or None,
        "torch": torch.__version__,
        "dtype": "fp32",
        "rounds": rounds,
        "rows": rows,
    }


def _time_op(timed: Timed, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of an op: its forward, and its forward and backward."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in timed.shapes]
    torch.compiler.reset()  # its kernels hold the number of threads that they were compiled for
    compiled = torch.compile(timed.eager, fullgraph=True, dynamic=False)
    variants: dict[str, Callable[..., Outputs]] = {"eager": timed.eager, "inductor": compiled}
    if native_problem(timed.op) is None:
        variants["native"] = timed.native
    rows = []
    for name, run in (("forward", _forward), ("forward+backward", _forward_backward)):
        least = dict.fromkeys(variants, float("inf"))
        for function in variants.values():
            run(function, inputs)
        for _ in range(rounds):
            for variant, function in variants.items():
                began = time.perf_counter()
                run(function, inputs)
                least[variant] = min(least[variant], time.perf_counter() - began)
        seconds = {variant: least.get(variant) for variant in ("eager", "inductor", "native")}
        rows.append({"op": timed.name, "shape": [*timed.shapes[0]], "threads": threads, "pass": name, **seconds})
    return rows


@torch.no_grad()
def _forward(function: Callable[..., Outputs], inputs: list[Tensor]) -> None:
    function(*inputs)


def _forward_backward(function: Callable[..., Outputs], inputs: list[Tensor]) -> None:
    outputs = function(*inputs)
    torch.autograd.grad(outputs, inputs, [out.detach() for out in outputs])
