"""A product that adds to an fp32 total: no rounding to the narrow format, and nothing of the weight's size in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_llm.ops.fused_accumulation import add_weight_gradient
from dist_llm.ops.linear import WeightGradients, linear


class Made(TorchDispatchMode):
    """Notes the format of every tensor of one shape that an operation returns."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape, self.formats = shape, list[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and tuple(out.shape) == self._shape:
            self.formats.append(out.dtype)
        return out


def _values(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn((6, width), generator=generator).to(dtype) for width in (5, 7))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_that_of_fp32(dtype: torch.dtype) -> None:
    grad, x = _values(dtype)
    total = torch.full((5, 7), 1000.0)
    for _ in range(3):
        add_weight_gradient(total, grad, x)
    torch.testing.assert_close(total, 1000 + 3 * (grad.float().t() @ x.float()), rtol=1e-6, atol=1e-3)
    rounded = (grad.t() @ x).float()
    assert not torch.allclose(rounded, grad.float().t() @ x.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_of_the_weights_size_is_made_in_the_narrow_format(fused: bool) -> None:
    _, x = _values(torch.bfloat16)
    weight = torch.randn(5, 7).bfloat16().requires_grad_()
    total = torch.zeros(5, 7)
    later = WeightGradients((lambda asked: total if asked is weight else None) if fused else None, waits=False)
    with Made((5, 7)) as made:
        for _ in range(2):
            linear(x, weight, None, later).float().sum().backward()
    if fused:
        assert torch.bfloat16 not in made.formats
        assert weight.grad is None
        torch.testing.assert_close(total, 2 * x.float().sum(0).expand(5, 7))
    else:
        assert made.formats.count(torch.bfloat16) >= 2
        assert weight.grad is not None


def test_a_small_product_still_counts_in_a_large_sum() -> None:
    """In bf16 a sum of equal numbers stays at 256 of them."""
    grad, x = torch.ones(1, 5).bfloat16(), torch.ones(1, 7).bfloat16()
    total, narrow = torch.zeros(5, 7), torch.zeros(5, 7).bfloat16()
    for _ in range(320):
        add_weight_gradient(total, grad, x)
        narrow += grad.t() @ x
    assert torch.equal(total, torch.full((5, 7), 320.0))
    assert narrow.max() == 256
