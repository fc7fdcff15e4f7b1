"""Rows sorted by group meet the matrix of their group, and no other."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dist_llm.ops.grouped_linear import grouped_linear
from dist_llm.ops.linear import WeightGradients


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [5, 0, 0], [1, 1, 1]])
def test_it_is_one_product_a_row(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((sum(counts), 4), generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn((3, 5, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    out = grouped_linear(x, weight, torch.tensor(counts))
    expected = torch.einsum("roi,ri->ro", weight[groups], x)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), (x, weight))
    theirs = torch.autograd.grad(expected.square().sum(), (x, weight))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0]])
@pytest.mark.parametrize("recomputed", [True, False])
def test_weight_gradients_wait_in_the_queue(counts: list[int], recomputed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((sum(counts), 4), generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn((3, 5, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor(counts)
    expected = torch.autograd.grad(2 * grouped_linear(x, weight, rows).square().sum(), (x, weight))
    later = WeightGradients()
    for _ in range(2):
        run = checkpoint(grouped_linear, x, weight, rows, later, use_reentrant=False) if recomputed else None
        out = grouped_linear(x, weight, rows, later) if run is None else run
        out.square().sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, expected[0])
    compute = later.take()
    compute()
    compute()
    torch.testing.assert_close(weight.grad, expected[1])
