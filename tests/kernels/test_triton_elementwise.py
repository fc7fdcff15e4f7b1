"""Activations, RoPE, softmax and AdamW in Triton, interpreted, against the formula in fp64."""

from __future__ import annotations

from unittest import mock

import pytest

pytest.importorskip("triton", reason="triton: not installed (it is for Linux alone)")

import torch
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.rope import inverse_frequencies, rotate, rotation_table
from dist_llm.ops.triton import adamw, bias_gelu, gated, rope, softmax, sum_of_squares
from tests.kernels.closeness import check_close
from tests.kernels.interpreter import interpreted

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def _leaf(x: Tensor) -> Tensor:
    return x.double().requires_grad_()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 77), (1, 9000), (0, 8)], ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
@interpreted
def test_gated(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up, grad = (3 * torch.randn(shape).to(dtype) for _ in range(3))
    wide_gate, wide_up = _leaf(gate), _leaf(up)
    active = functional.silu(wide_gate) if kind == "swiglu" else functional.gelu(wide_gate, approximate="tanh")
    (active * wide_up).backward(grad.double())
    forward, backward = vars(gated)[kind], vars(gated)[f"{kind}_backward"]
    check_close(forward(gate, up), (active * wide_up).detach())
    grad_gate, grad_up = backward(grad, gate, up)
    check_close(grad_gate, wide_gate.grad)
    check_close(grad_up, wide_up.grad)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@interpreted
def test_bias_gelu(with_bias: bool, dtype: torch.dtype) -> None:
    x, grad, bias = torch.randn(2, 3, 2100).to(dtype), torch.randn(2, 3, 2100).to(dtype), torch.randn(2100)
    wide, shift = _leaf(x), _leaf(bias)
    expected = functional.gelu(wide + shift if with_bias else wide, approximate="tanh")
    expected.backward(grad.double())
    check_close(bias_gelu.bias_gelu(x, bias if with_bias else None), expected.detach())
    grad_x, grad_bias = bias_gelu.bias_gelu_backward(grad, x, bias if with_bias else None)
    check_close(grad_x, wide.grad)
    assert (grad_bias is None) == (not with_bias)
    if grad_bias is not None:
        check_close(grad_bias, shift.grad)


@interpreted
def test_far_from_zero_activations_neither_overflow_nor_vanish() -> None:
    x = torch.tensor([[-1e4, -100.0, -10.0, 0.0, 10.0, 100.0, 1e4]])
    check_close(bias_gelu.bias_gelu(x, None), functional.gelu(x.double(), approximate="tanh"))
    check_close(gated.swiglu(x, torch.ones_like(x)), functional.silu(x.double()))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 16), ((3, 1), 10)], ids=str)
@interpreted
def test_rope(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    cos, sin = rotation_table(inverse_frequencies(head_dim, 1e4), 5, 1.0)
    q, k = (torch.randn(2, 5, count, head_dim).to(dtype) for count in heads)
    turned = q.clone(), k.clone()
    rope.rope_(*turned, cos.float(), sin.float())
    back = turned[0].clone(), turned[1].clone()
    rope.rope_(*back, cos.float(), sin.float(), inverse=True)
    for x, once, again in zip((q, k), turned, back, strict=True):
        check_close(once, rotate(x.double(), cos, sin))
        check_close(again, rotate(once.double(), cos, -sin))


@interpreted
def test_rope_of_parts_of_a_product() -> None:
    cos, sin = rotation_table(inverse_frequencies(8, 1e4), 4, 1.0)
    product = torch.randn(2, 4, 5, 8)
    before = product.clone()
    rope.rope_(product[:, :, :3], product[:, :, 3:4], cos.float(), sin.float())
    check_close(product[:, :, :4], rotate(before[:, :, :4].double(), cos, sin))
    assert torch.equal(product[:, :, 4], before[:, :, 4])
    with pytest.raises(ValueError, match="cannot be rotated in place"):
        rope.rope_(*product.transpose(0, 1).split((3, 2), 2), cos[:2].float(), sin[:2].float())


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [None, 1, 2])
@interpreted
def test_softmax(shared: int | None, causal: bool, dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 2, 3, 37).to(dtype), torch.randn(2, 2, 3, 37).to(dtype)
    mask = None if shared is None else torch.rand(2, shared, 3, 37) < 0.7
    seen = torch.ones(3, 37, dtype=torch.bool).tril(34) if causal else torch.ones(3, 37, dtype=torch.bool)
    seen = seen if mask is None else seen & mask
    wide = _leaf(x)
    expected = (0.5 * wide).masked_fill(~seen, -torch.inf).softmax(-1)
    out = softmax.scaled_masked_softmax(x, mask, 0.5, causal)
    check_close(out, expected.detach())
    found = softmax.scaled_masked_softmax_backward(grad, out, 0.5)
    kept = out.double()
    check_close(found, 0.5 * kept * (grad.double() - (kept * grad.double()).sum(-1, keepdim=True)))
    if dtype == torch.float32:
        expected.backward(grad.double())
        check_close(found, wide.grad)


@interpreted
def test_softmax_of_a_row_that_sees_nothing_is_zero() -> None:
    mask = torch.tensor([True, False])[None, None, :, None].expand(1, 1, 2, 5)
    out = softmax.scaled_masked_softmax(torch.randn(1, 1, 2, 5), mask, 1.0, causal=False)
    check_close(out.sum(-1), torch.tensor([[[1.0, 0.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@interpreted
def test_adamw(dtype: torch.dtype) -> None:
    count, rule = 5000, adamw.Rule(0.9, 0.95, 1e-8, 0.1)
    weight = torch.randn(count)
    reference = weight.double().clone().requires_grad_()
    torch_rule = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments, narrow = (torch.zeros(count), torch.zeros(count)), torch.zeros(count, dtype=torch.bfloat16)
    for step in range(1, 4):
        grad = torch.randn(count).to(dtype)
        reference.grad = grad.double() * 0.25 / 8
        torch_rule.step()
        numbers = [0.25, 1 / 8, 1e-2, 1 / (1 - 0.9**step), 1 / (1 - 0.95**step), 0.0]
        adamw.adamw_flat_(weight, moments, grad, narrow, torch.tensor(numbers), rule)
    check_close(weight, reference.detach())
    check_close(narrow, reference.detach())
    check_close(moments[0], torch_rule.state[reference]["exp_avg"])
    check_close(moments[1], torch_rule.state[reference]["exp_avg_sq"])


@interpreted
def test_adamw_after_an_overflow_changes_nothing() -> None:
    state = [torch.ones(100) for _ in range(3)]
    scalars = torch.tensor([1.0, 1.0, 0.1, 10.0, 20.0, 1.0])
    adamw.adamw_flat_(
        state[0], (state[1], state[2]), torch.full((100,), torch.inf), None, scalars, adamw.Rule(0.9, 0.95, 1e-8, 0.1)
    )
    assert all(torch.equal(x, torch.ones(100)) for x in state)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5000, 40000])
@interpreted
def test_sum_of_squares(count: int, dtype: torch.dtype) -> None:
    x = torch.randn(count).to(dtype)
    check_close(sum_of_squares.sum_of_squares(x), x.double().square().sum())


@interpreted
def test_more_blocks_than_programs_add_up() -> None:
    x = torch.randn(40000)
    with mock.patch.object(sum_of_squares, "NUM_PARTS", 4):
        check_close(sum_of_squares.sum_of_squares(x), x.double().square().sum())
