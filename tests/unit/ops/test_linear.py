"""A linear whose weight gradient waits gives the gradients of torch's own, once they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dist_llm.ops.linear import WeightGradients, linear


def _values(with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(2, 3, 5), (7, 5), (7,)]
    x, weight, bias = (torch.randn(size, generator=generator).requires_grad_() for size in sizes)
    return x, weight, bias if with_bias else None


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
def test_gradients_are_torchs_after_the_second_half(with_bias: bool, recomputed: bool) -> None:
    x, weight, bias = _values(with_bias)
    expected = _values(with_bias)
    later = WeightGradients()
    for _ in range(2):
        functional.linear(*expected).square().sum().backward()
        out = checkpoint(linear, x, weight, bias, later, use_reentrant=False) if recomputed else None
        out = linear(x, weight, bias, later) if out is None else out
        out.square().sum().backward()
    assert weight.grad is None
    assert torch.equal(x.grad, expected[0].grad)  # type: ignore[arg-type]
    later.take()()
    for ours, theirs in zip((weight, bias), expected[1:], strict=True):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
            assert not ours.grad.requires_grad  # type: ignore[union-attr]


def test_what_was_taken_does_not_come_again() -> None:
    x, weight, bias = _values(True)
    later = WeightGradients()
    linear(x, weight, bias, later).sum().backward()
    compute = later.take()
    compute()
    once = weight.grad.clone()  # type: ignore[union-attr]
    compute()
    later.take()()
    assert torch.equal(weight.grad, once)  # type: ignore[arg-type]


def test_without_a_queue_it_is_torchs() -> None:
    x, weight, bias = _values(True)
    assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))


def test_what_was_computed_keeps_no_graph() -> None:
    """A gradient with a graph behind it would keep the activations of every microbatch until the step ends."""
    x, weight, bias = _values(with_bias=True)
    later = WeightGradients()
    for _ in range(2):
        linear(x * 2, weight, bias, later).square().sum().backward()
        later.take()()
    for parameter in (weight, bias):
        assert parameter is not None
        assert parameter.grad is not None
        assert parameter.grad.grad_fn is None
