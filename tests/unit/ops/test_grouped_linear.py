"""Rows sorted by group meet the matrix of their group, and no other."""

from __future__ import annotations

import pytest
import torch

from dist_llm.ops.grouped_linear import grouped_linear


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
