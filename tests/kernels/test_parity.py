"""Every backend that loads here computes what the reference does, in every format and shape, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_llm.ops.backends import NATIVE, REFERENCE, TORCH, TRITON, kernel
from dist_llm.ops.registry import CUSTOM_OPS
from tests.kernels.cases import (
    CASES,
    EPS,
    Inputs,
    backends_of,
    interpreted_backends_of,
    problem_of,
    truth,
    with_gradients,
)
from tests.kernels.interpreter import run_interpreted

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WITHIN = {"fp32": 3e-6, "bf16": 1.2e-2, "fp16": 1.5e-3}
"""Relative to the largest entry of a tensor: a few roundings of the format."""
SLACK = {TORCH: 2}
"""PyTorch's own functions sum the gradients of weights in their format."""
SHAPES = ((3, 64), (2, 5, 385), (7, 3), (1, 4096), (33, 17))
FEW_SHAPES = ((2, 3, 65), (7, 3))
"""For what is interpreted, at some milliseconds a row."""

HERE = [(name, backend) for name, case in CASES.items() for backend in backends_of(case.op)]
LIBRARY = [pair for pair in HERE if pair[1] == NATIVE]
INTERPRETED = [(name, backend) for name, case in CASES.items() for backend in interpreted_backends_of(case.op)]
ALL_SHAPES = [(*pair, shape) for pair in HERE for shape in SHAPES]
ALL_SHAPES += [(*pair, shape) for pair in INTERPRETED for shape in FEW_SHAPES]
needs_library = pytest.mark.skipif(
    problem_of("rms_norm", NATIVE) is not None, reason=f"kernels: {problem_of('rms_norm', NATIVE)}"
)


def where_it_computes(test: Callable[..., None]) -> Callable[..., None]:
    """Let a test of a backend run in the process in which that computes on a CPU."""

    @wraps(test)
    def run(**arguments: Any) -> None:
        if (arguments["name"], arguments["backend"]) in INTERPRETED:
            run_interpreted(test, arguments)
        else:
            test(**arguments)

    return run


def every_pair(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of every op by every backend."""
    return pytest.mark.parametrize(("name", "backend"), HERE + INTERPRETED)(where_it_computes(test))


every_pair_here = pytest.mark.parametrize(("name", "backend"), HERE)


def assert_near(found: Inputs, wanted: Inputs, tolerance: float) -> None:
    assert len(found) == len(wanted)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.shape == other.shape
        gap = (one.double() - other).abs().max().item() if one.numel() else 0.0
        size = other.abs().max().item() if one.numel() else 1.0
        assert gap <= tolerance * max(size, 1e-3), f"tensor {index}: {gap:.2e} of {size:.2e}"


@pytest.mark.parametrize(("name", "backend", "shape"), ALL_SHAPES, ids=str)
@pytest.mark.parametrize("precision", FORMATS)
@where_it_computes
def test_a_backend_is_the_reference(name: str, backend: str, shape: tuple[int, ...], precision: str) -> None:
    case, dtype = CASES[name], FORMATS[precision]
    for weights in {dtype, torch.float32}:
        inputs = case.inputs(shape, dtype, weights)
        outputs = with_gradients(case, backend, inputs)
        assert outputs[0].dtype == dtype
        assert_near(outputs, truth(case, inputs), WITHIN[precision] * SLACK.get(backend, 1))


@every_pair
def test_no_rows(name: str, backend: str) -> None:
    inputs = CASES[name].inputs((0, 3, 24), torch.float32, torch.float32)
    for found, wanted in zip(
        with_gradients(CASES[name], backend, inputs), with_gradients(CASES[name], REFERENCE, inputs), strict=True
    ):
        assert torch.equal(found, wanted)


@every_pair
def test_gaps_between_elements(name: str, backend: str) -> None:
    """Transposed and strided inputs give what their dense copies do, of our kernels bit for bit."""
    case = CASES[name]
    dense = case.inputs((6, 5, 24), torch.float32, torch.float32)

    def spread(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2] if x.dim() == 1 else wide.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2]

    spaced = tuple(map(spread, dense))
    assert not any(x.is_contiguous() for x in spaced)
    found, wanted = with_gradients(case, backend, spaced), with_gradients(case, backend, dense)
    if backend == TORCH:
        assert_near(found, tuple(x.double() for x in wanted), WITHIN["fp32"])
    else:
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@every_pair_here
def test_large_rows(name: str, backend: str) -> None:
    """A row of 2^20 numbers: sums in one fp32 accumulator would lose digits."""
    inputs = CASES[name].inputs((2, 1 << 20), torch.float32, torch.float32)
    assert_near(with_gradients(CASES[name], backend, inputs), truth(CASES[name], inputs), 1e-5)


@every_pair
def test_a_number_that_is_none_stays_none(name: str, backend: str) -> None:
    inputs = CASES[name].inputs((4, 40), torch.float32, torch.float32)
    inputs[0][1, 3] = torch.nan
    found = CASES[name].call(backend, inputs)[0]
    wanted = CASES[name].call(REFERENCE, inputs)[0]
    assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize(("name", "backend"), LIBRARY)
def test_any_number_of_threads_gives_the_same_bits(name: str, backend: str) -> None:
    inputs = CASES[name].inputs((301, 96), torch.float32, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradients(CASES[name], backend, inputs)
        torch.set_num_threads(2)
        two = with_gradients(CASES[name], backend, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize(("name", "backend"), [pair for pair in HERE + INTERPRETED if pair != ("cross_entropy", TORCH)])
@where_it_computes
def test_second_gradients(name: str, backend: str) -> None:
    """The gradient of a gradient is the reference's, in fp32 as close as two differences allow, or a plain error.

    Of torch's cross entropy there is one, and of the reference's none to compare it with.
    """
    case = CASES[name]

    def twice(which: str, inputs: Inputs) -> Inputs:
        leaves = [x.detach().requires_grad_() for x in inputs]
        used = [leaf for leaf in leaves if leaf.numel()]
        out = sum((x**3).sum() for x in case.call(which, tuple(leaves)))
        first = torch.autograd.grad(out, used, create_graph=True, allow_unused=True)
        second = sum((grad**2).sum() for grad in first if grad is not None)
        return tuple(g for g in torch.autograd.grad(second, used, allow_unused=True) if g is not None)

    inputs = case.inputs((3, 9), torch.float32, torch.float32)
    if not case.twice:
        with pytest.raises(NotImplementedError, match="has no second gradient"):
            twice(backend, inputs)
        return
    assert_near(twice(backend, inputs), twice(REFERENCE, tuple(x.double() for x in inputs)), 2e-5)


@pytest.mark.parametrize(("name", "backend"), LIBRARY + INTERPRETED)
@where_it_computes
def test_torch_knows_the_op(name: str, backend: str) -> None:
    """Schema, shapes without values and gradients are what torch.library.opcheck holds true."""
    case = CASES[name]
    for dtype in (torch.float32, torch.bfloat16)[: 1 if backend == TRITON else 2]:
        inputs = tuple(x.requires_grad_() for x in case.inputs((4, 24), dtype, torch.float32))
        torch.library.opcheck(case.kernel(backend), case.raw(inputs))  # type: ignore[arg-type]


class _Overloads(TorchDispatchMode):
    """Notes which overloads of our ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dist_llm":
            self.seen.add((func._schema.name.removeprefix("dist_llm::"), func._overloadname))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "backend"), LIBRARY + INTERPRETED)
@where_it_computes
def test_forward_and_backward_are_of_one_backend(name: str, backend: str) -> None:
    """A backward that called another's kernels would find none on a GPU."""
    case = CASES[name]
    with _Overloads() as overloads:
        with_gradients(case, backend, case.inputs((4, 24), torch.float32, torch.float32))
    names, backends = zip(*overloads.seen, strict=True)
    assert set(backends) == {"default" if backend == NATIVE else backend}
    wanted = {text for text in CUSTOM_OPS[case.op].schemas if text.endswith(("backward", "gradient_", "rope"))}
    assert any(seen in wanted for seen in names)


@needs_library
@pytest.mark.parametrize("name", CASES)
def test_all_kernels_of_an_op_have_one_schema(name: str) -> None:
    for schema, text in CUSTOM_OPS[CASES[name].op].schemas.items():
        library = str(kernel(schema, NATIVE)._schema)
        assert library == f"dist_llm::{schema}{text}"


@needs_library
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_graph_holds_the_op_whole() -> None:
    """The op itself: the shape checks around our functions, which tests have, cannot be traced."""
    case, op = CASES["add_rms_norm"], torch.ops.dist_llm.add_rms_norm
    inputs = case.inputs((4, 24), torch.float32, torch.float32)
    whole = torch.compile(lambda x, residual, weight: op(x, residual, weight, EPS)[:2], fullgraph=True)
    compiled = replace(case, call=lambda backend, i: whole(*i[:3]))
    pairs = zip(with_gradients(compiled, NATIVE, inputs), with_gradients(case, NATIVE, inputs), strict=True)
    assert all(torch.equal(found, wanted) for found, wanted in pairs)


@needs_library
def test_a_backward_op_has_no_gradient_and_says_so() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    grad, _ = torch.ops.dist_llm.rms_norm_backward(x, None, x, weight, torch.ones(3))
    with pytest.raises(NotImplementedError, match="rms_norm_backward has no gradient"):
        grad.sum().backward()


@needs_library
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((3, 4), torch.float64, 4), "x must be float32, bfloat16 or float16, not Double"),
        (((3, 4), torch.float32, 5), r"weight must be \[4\], not \[5\]"),
        (((), torch.float32, 1), "x must have at least one dim"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments: tuple[tuple[int, ...], torch.dtype, int], words: str) -> None:
    shape, dtype, width = arguments
    for op in ("rms_norm", "add_rms_norm"):
        x = torch.ones(shape, dtype=dtype)
        with pytest.raises(RuntimeError, match=words):
            getattr(torch.ops.dist_llm, op)(*[x] * (1 + (op == "add_rms_norm")), torch.ones(width), 1e-5)


@needs_library
def test_tensors_that_disagree_are_an_error() -> None:
    x, weight = torch.ones(3, 4), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"residual and x must have one shape, not \[2, 4\] and \[3, 4\]"):
        torch.ops.dist_llm.add_rms_norm(x, x[:2], weight, 1e-5)
    with pytest.raises(RuntimeError, match="residual and x must have one dtype, not BFloat16 and Float"):
        torch.ops.dist_llm.add_rms_norm(x, x.bfloat16(), weight, 1e-5)
    with pytest.raises(RuntimeError, match=r"up and gate must have one shape, not \[2, 4\] and \[3, 4\]"):
        torch.ops.dist_llm.swiglu(x, x[:2])
    with pytest.raises(RuntimeError, match=r"bias must be \[4\], not \[3\]"):
        torch.ops.dist_llm.bias_gelu(x, torch.ones(3))
    heads, table = torch.ones(2, 5, 3, 8), torch.ones(5, 4)
    with pytest.raises(RuntimeError, match="key and query must differ in heads alone"):
        torch.ops.dist_llm.rope(heads, heads[:1], table, table, False)
    with pytest.raises(RuntimeError, match=r"sin must be float32 \[5, 4\], not Float \[4, 4\]"):
        torch.ops.dist_llm.rope(heads, heads, table, table[:4], False)
    with pytest.raises(RuntimeError, match="rstd must be float32 and have a number for each row"):
        torch.ops.dist_llm.rms_norm_backward(x, None, x, weight, torch.ones(2))
