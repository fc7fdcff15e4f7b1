"""RMSNorm and LayerNorm in Triton, interpreted, against the formula in fp64."""

from __future__ import annotations

from unittest import mock

import pytest

pytest.importorskip("triton", reason="triton: not installed (it is for Linux alone)")

import torch
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.triton import layer_norm, rms_norm
from tests.kernels.closeness import check_close
from tests.kernels.interpreter import interpreted

EPS = 1e-5
SHAPES = [(5, 77), (3, 4, 64), (2, 8000), (0, 16), (1, 3)]
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return x, residual, gradient, gradient of the sum; weight and bias stay in fp32."""
    rows = [torch.randn(shape).to(dtype) for _ in range(4)]
    return *rows, torch.randn(shape[-1]), torch.randn(shape[-1])


def _leaf(x: Tensor) -> Tensor:
    return x.double().requires_grad_()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@interpreted
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, _, grad, _, weight, _ = _inputs(shape, dtype)
    wide, scale = _leaf(x), _leaf(weight)
    expected = functional.rms_norm(wide, shape[-1:], scale, EPS)
    expected.backward(grad.double())
    out, rstd = rms_norm.rms_norm(x, weight, EPS)
    check_close(out, expected.detach())
    check_close(rstd, torch.rsqrt(x.double().square().mean(-1) + EPS))
    grad_x, grad_weight = rms_norm.rms_norm_backward(grad, None, x, weight, rstd)
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)
    check_close(grad_x, wide.grad)
    check_close(grad_weight, scale.grad)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@interpreted
def test_rms_norm_of_a_sum(dtype: torch.dtype) -> None:
    x, residual, grad, grad_total, weight, _ = _inputs((5, 77), dtype)
    out, total, rstd = rms_norm.add_rms_norm(x, residual, weight, EPS)
    check_close(total, x.double() + residual.double())
    wide, scale = _leaf(total), _leaf(weight)
    expected = functional.rms_norm(wide, (77,), scale, EPS)
    (expected * grad.double() + wide * grad_total.double()).sum().backward()
    check_close(out, expected.detach())
    grad_x, grad_weight = rms_norm.rms_norm_backward(grad, grad_total, total, weight, rstd)
    check_close(grad_x, wide.grad)
    check_close(grad_weight, scale.grad)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@interpreted
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, _, grad, _, weight, bias = _inputs(shape, dtype)
    x += 3.0  # a mean that cancellation would show
    wide, scale, shift = _leaf(x), _leaf(weight), _leaf(bias)
    expected = functional.layer_norm(wide, shape[-1:], scale, shift, EPS)
    expected.backward(grad.double())
    out, mean, rstd = layer_norm.layer_norm(x, weight, bias, EPS)
    check_close(out, expected.detach())
    check_close(mean, x.double().mean(-1))
    found = layer_norm.layer_norm_backward(grad, None, x, weight, mean, rstd)
    for actual, wanted in zip(found, (wide.grad, scale.grad, shift.grad), strict=True):
        check_close(actual, wanted)


@pytest.mark.parametrize("with_bias", [True, False])
@interpreted
def test_layer_norm_of_a_sum(with_bias: bool) -> None:
    x, residual, grad, grad_total, weight, bias = _inputs((5, 77), torch.bfloat16)
    out, total, mean, rstd = layer_norm.add_layer_norm(x, residual, weight, bias if with_bias else None, EPS)
    check_close(total, x.double() + residual.double())
    wide, scale = _leaf(total), _leaf(weight)
    expected = functional.layer_norm(wide, (77,), scale, bias.double() if with_bias else None, EPS)
    (expected * grad.double() + wide * grad_total.double()).sum().backward()
    check_close(out, expected.detach())
    grad_x, grad_weight, _ = layer_norm.layer_norm_backward(grad, grad_total, total, weight, mean, rstd)
    check_close(grad_x, wide.grad)
    check_close(grad_weight, scale.grad)


@interpreted
def test_more_rows_than_programs_add_up() -> None:
    x, _, grad, _, weight, _ = _inputs((11, 24), torch.float32)
    wide, scale = _leaf(x), _leaf(weight)
    functional.rms_norm(wide, (24,), scale, EPS).backward(grad.double())
    _, rstd = rms_norm.rms_norm(x, weight, EPS)
    with mock.patch.object(rms_norm, "NUM_PARTS", 4):
        check_close(rms_norm.rms_norm_backward(grad, None, x, weight, rstd)[1], scale.grad)


@interpreted
def test_rows_of_a_transposed_tensor() -> None:
    x = torch.randn(8, 5).t()
    out, _ = rms_norm.rms_norm(x, torch.ones(8), EPS)
    check_close(out, functional.rms_norm(x.double(), (8,), None, EPS))


def test_what_no_kernel_computes_is_refused() -> None:
    with pytest.raises(ValueError, match="up to 8192 elements in this kernel, not 9000"):
        rms_norm.rms_norm(torch.zeros(1, 9000), torch.ones(9000), EPS)
    with pytest.raises(TypeError, match="float64"):
        rms_norm.rms_norm(torch.zeros(1, 4).double(), torch.ones(4), EPS)
