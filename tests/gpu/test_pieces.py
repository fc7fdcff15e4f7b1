"""On a CUDA device fused pieces of attention are the reference's, in every format, with and without a mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dist_llm.ops import block_attention, fused_attention
from dist_llm.ops.block_attention import Piece, merge

pytestmark = pytest.mark.gpu


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.cpu().double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("masked", "causal"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
    ids=str,
)
def test_fused_pieces_are_the_reference_on_cuda(masked: bool, causal: bool, dtype: torch.dtype, bound: float) -> None:
    queries, keys = (100, 100) if causal else (52, 300)
    query, key, value, grad_out = (
        _random(2, heads, 2 * length, 64, seed=seed).to(dtype)[:, :, length:]
        for seed, (heads, length) in enumerate(((4, queries), (2, keys), (2, keys), (4, queries)))
    )
    mask = None
    if masked:
        mask = _random(2, 1, queries, keys, seed=9) > 0
        mask[0, :, 3], mask[1, :, 5:20, :200] = False, False
    exact = Piece(query.double(), key.double(), value.double(), mask, causal, scale=0.2)
    there = [x.cuda() for x in (query, key, value)]
    piece = Piece(there[0], there[1], there[2], None if mask is None else mask.cuda(), causal, scale=0.2)
    (out, lse), (true_out, true_lse) = fused_attention.attend(piece), block_attention.attend(exact)
    seen = true_lse > -math.inf
    assert torch.equal(lse.cpu() > -math.inf, seen)
    assert _gap(out.cpu()[seen], true_out[seen]) <= bound
    assert _gap(lse.cpu()[seen], true_lse[seen]) <= bound
    whole, sums = merge(_random(*out.shape, seed=10), _random(*lse.shape, seed=11), true_out, true_lse)
    ours = fused_attention.gradients(piece, whole.to(dtype).cuda(), sums.to(lse.dtype).cuda(), grad_out.cuda())
    for mine, true in zip(ours, block_attention.gradients(exact, whole, sums, grad_out.double()), strict=True):
        assert _gap(mine, true) <= bound
