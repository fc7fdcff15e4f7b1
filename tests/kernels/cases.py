"""Every op with a choice of backends: how it is called, and inputs of every kind that it must take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from dist_llm.ops.backends import NATIVE, REFERENCE, TORCH, TRITON, kernel
from dist_llm.ops.gelu import bias_gelu, gelu
from dist_llm.ops.layer_norm import add_layer_norm, layer_norm
from dist_llm.ops.registry import BACKENDS, Place, backend_problem
from dist_llm.ops.rms_norm import add_rms_norm, rms_norm
from dist_llm.ops.rope import inverse_frequencies, rotate_pair, rotation_table
from dist_llm.ops.swiglu import swiglu
from dist_llm.parallel.cross_entropy import cross_entropy_sum
from dist_llm.types import IGNORE_INDEX
from tests.kernels.axes import ALONE

EPS = 1e-5
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An op as a function of (backend, inputs) that returns tensors; raw: the arguments of its kernel, by its schema.

    inputs: of rows of a shape in a format, weights in another. twice: whether it can be differentiated twice.
    """

    name: str
    op: str
    call: Callable[[str, Inputs], tuple[Tensor, ...]]
    inputs: Callable[[tuple[int, ...], torch.dtype, torch.dtype], Inputs]
    raw: Callable[[Inputs], tuple[object, ...]]
    schema: str = ""
    twice: bool = True

    def kernel(self, backend: str) -> Callable[..., object]:
        """Return the op as a backend computes it, to be checked by itself."""
        return kernel(self.schema or self.name, backend)


def _rows(count: int) -> Callable[[tuple[int, ...], torch.dtype, torch.dtype], Inputs]:
    """Return what makes so many inputs of rows, then a weight and a bias."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(sum(shape) + 7 * count)
        wide = [torch.randn(shape, generator=generator) * 2 + 0.5 for _ in range(count)]
        weight, bias = 1 + 0.2 * torch.randn(2, shape[-1], generator=generator)
        return *(x.to(dtype) for x in wide), weight.to(weights), bias.to(weights)

    return make


def _heads(shape: tuple[int, ...], dtype: torch.dtype, _: torch.dtype) -> Inputs:
    """Return two heads of queries and one of keys side by side for each token, and the fp32 table of a sequence."""
    width, generator = shape[-1], torch.Generator().manual_seed(sum(shape))
    query, key = (torch.randn(*shape[:-1], heads * 2 * width, generator=generator).to(dtype) for heads in (2, 1))
    cos, sin = rotation_table(inverse_frequencies(2 * width, 1e4), shape[-2], 1.25)
    return query, key, cos.float(), sin.float()


def _split(inputs: Inputs) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the heads of what `_heads` made, of one sequence unless there are several, and the table."""
    query, key, cos, sin = inputs
    query, key = (x if x.dim() == 3 else x[None] for x in (query, key))
    return query.unflatten(-1, (2, -1)), key.unflatten(-1, (1, -1)), (cos.detach(), sin.detach())


def _rope(backend: str, inputs: Inputs) -> Inputs:
    query, key, table = _split(inputs)
    return rotate_pair(query, key, table, backend)


def _raw_rope(inputs: Inputs) -> tuple[object, ...]:
    query, key, table = _split(inputs)
    return query.detach().requires_grad_(), key.detach().requires_grad_(), *table, False


def _logits(shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype) -> Inputs:
    return _rows(1)(shape, dtype, weights)[:1]


def _targets(logits: Tensor) -> Tensor:
    """Return a target for each row, and none for every fifth."""
    targets = torch.arange(logits[..., 0].numel()) * 7919 % logits.shape[-1]
    targets[4::5] = IGNORE_INDEX
    return targets.view(logits.shape[:-1])


def _cross_entropy(backend: str, inputs: Inputs) -> Inputs:
    logits = inputs[0].clone()  # a backward may write over them
    rows = logits if logits.dim() == 3 else logits[None]
    total = cross_entropy_sum(rows, _targets(rows), rows.shape[-1], ALONE, backend)
    return (total.to(logits.dtype),)


CASES = {
    case.name: case
    for case in (
        Case(
            "rms_norm",
            "rms_norm",
            lambda backend, i: (rms_norm(i[0], i[1], EPS, backend),),
            _rows(1),
            lambda i: (i[0], i[1], EPS),
        ),
        Case(
            "add_rms_norm",
            "rms_norm",
            lambda backend, i: add_rms_norm(i[0], i[1], i[2], EPS, backend),
            _rows(2),
            lambda i: (i[0], i[1], i[2], EPS),
        ),
        Case(
            "layer_norm",
            "layer_norm",
            lambda backend, i: (layer_norm(i[0], i[1], i[2], EPS, backend),),
            _rows(1),
            lambda i: (i[0], i[1], i[2], EPS),
        ),
        Case(
            "layer_norm_without_bias",
            "layer_norm",
            lambda backend, i: (layer_norm(i[0], i[1], None, EPS, backend),),
            _rows(1),
            lambda i: (i[0], i[1], None, EPS),
            "layer_norm",
        ),
        Case(
            "add_layer_norm",
            "layer_norm",
            lambda backend, i: add_layer_norm(i[0], i[1], (i[2], i[3]), EPS, backend),
            _rows(2),
            lambda i: (i[0], i[1], i[2], i[3], EPS),
        ),
        Case("gelu", "gelu", lambda backend, i: (gelu(i[0], backend),), _rows(1), lambda i: (i[0],)),
        Case(
            "bias_gelu",
            "gelu",
            lambda backend, i: (bias_gelu(i[0], i[1], backend),),
            _rows(1),
            lambda i: (i[0], i[1]),
        ),
        Case(
            "swiglu",
            "swiglu",
            lambda backend, i: (swiglu(i[0], i[1], backend),),
            _rows(2),
            lambda i: (i[0], i[1]),
        ),
        Case("rope", "rope", _rope, _heads, _raw_rope),
        Case(
            "cross_entropy",
            "cross_entropy",
            _cross_entropy,
            _logits,
            lambda i: (i[0], _targets(i[0]), 0, i[0].shape[-1], IGNORE_INDEX),
            "cross_entropy_statistics",
            twice=False,
        ),
    )
}


def backends_of(op: str) -> list[str]:
    """Return what can compute an op here beside the reference."""
    return [backend for backend in (NATIVE, TORCH) if backend in BACKENDS[op] and problem_of(op, backend) is None]


def interpreted_backends_of(op: str) -> list[str]:
    """Return what can compute an op where kernels are interpreted, which is another process."""
    return [TRITON] if TRITON in BACKENDS[op] and find_spec("triton") is not None else []


def problem_of(op: str, backend: str) -> str | None:
    """Say why a backend cannot compute an op on this CPU, in this process."""
    return backend_problem(op, backend, Place("cpu", torch.float32))


def truth(case: Case, inputs: Inputs) -> Inputs:
    """Return the reference's outputs and gradients in fp64, of inputs as their formats hold them."""
    return with_gradients(case, REFERENCE, tuple(x.double() if x.is_floating_point() else x for x in inputs))


def with_gradients(case: Case, backend: str, inputs: Inputs) -> Inputs:
    """Return outputs and the gradients of all inputs, of a fixed random function of the outputs."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = case.call(backend, tuple(leaves))
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out.dtype) for out in outputs]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, pulls, allow_unused=True)
    return *(out.detach() for out in outputs), *(grad for grad in grads if grad is not None)
