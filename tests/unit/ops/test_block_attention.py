"""Pieces of attention add up to attention: outputs, log-sum-exps, gradients; fused pieces are the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_llm.ops import block_attention, fused_attention
from dist_llm.ops.block_attention import Piece, default_scale, merge, wide
from dist_llm.ops.context_share import ContextShare

B, H, G, T, D = 2, 6, 2, 8, 4
SCALE = default_scale(D)
WAYS: dict[str, Any] = {"reference": block_attention, "fused": fused_attention}
Gradients = tuple[Tensor, Tensor, Tensor]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    return _random(B, H, T, D, seed=1), _random(B, G, T, D, seed=2), _random(B, G, T, D, seed=3)


def _reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _halves(mask: Tensor) -> list[tuple[slice, Tensor]]:
    return [(keys, mask[..., keys]) for keys in (slice(None, T // 2), slice(T // 2, None))]


def _causal() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)


@pytest.mark.parametrize("way", WAYS)
def test_halves_of_the_keys_merge_to_the_whole(way: str) -> None:
    attend = WAYS[way].attend
    query, key, value = _inputs()
    # The second half is not seen at all by the first queries: its log-sum-exp there is -inf.
    (first, first_mask), (second, second_mask) = _halves(_causal())
    out, lse = attend(Piece(query, key[:, :, first], value[:, :, first], first_mask, False, SCALE))
    more = attend(Piece(query, key[:, :, second], value[:, :, second], second_mask, False, SCALE))
    assert (more[1][..., 0] == -math.inf).all()
    assert more[0].isfinite().all()
    merged, whole_lse = merge(out, lse, *more)
    torch.testing.assert_close(merged, _reference(query, key, value, _causal()))
    torch.testing.assert_close(whole_lse, attend(Piece(query, key, value, None, True, SCALE))[1])


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_the_halves_add_up(way: str) -> None:
    query, key, value = (x.requires_grad_() for x in _inputs())
    out = _reference(query, key, value, _causal())
    grad_out = _random(*out.shape, seed=4)
    out.backward(grad_out)
    gradients: Callable[..., Gradients] = WAYS[way].gradients
    with torch.no_grad():
        lse = WAYS[way].attend(Piece(query, key, value, None, True, SCALE))[1]
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for keys, part in _halves(_causal()):
            more = gradients(Piece(query, key[:, :, keys], value[:, :, keys], part, False, SCALE), out, lse, grad_out)
            grad_query += more[0]
            grad_key[:, :, keys] += more[1]
            grad_value[:, :, keys] += more[2]
    for ours, tensor in ((grad_query, query), (grad_key, key), (grad_value, value)):
        torch.testing.assert_close(ours, tensor.grad)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("masked", "causal"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)
def test_fused_pieces_are_the_reference(masked: bool, causal: bool, dtype: torch.dtype, bound: float) -> None:
    """Halves of wider tensors, grouped heads, more keys than a kernel's block, queries that see nothing."""
    queries, keys = (96, 96) if causal else (64, 700)
    query, key, value, grad_out = (
        (_random(2, heads, 2 * length, 6, seed=seed).to(dtype)[:, :, length:])
        for seed, (heads, length) in enumerate(((4, queries), (2, keys), (2, keys), (4, queries)))
    )
    mask = None
    if masked:
        mask = _random(2, 1, queries, keys, seed=9) > 0
        mask[0, :, 3], mask[1, :, 5:20, :600] = False, False
    piece = Piece(query, key, value, mask, causal, scale=0.3)
    exact = Piece(query.double(), key.double(), value.double(), mask, causal, scale=0.3)
    (out, lse), (true_out, true_lse) = fused_attention.attend(piece), block_attention.attend(exact)
    assert lse.dtype == wide(dtype)
    assert out.dtype == dtype
    seen = true_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert _gap(out[seen], true_out[seen]) <= bound
    assert _gap(lse[seen], true_lse[seen]) <= bound
    # Over other keys too, as a ring has it: what the queries see here is then only some of what they see.
    other_out, other_lse = _random(*out.shape, seed=10), _random(*lse.shape, seed=11)
    whole, sums = merge(other_out, other_lse, true_out, true_lse)
    ours = fused_attention.gradients(piece, whole.to(dtype), sums.to(lse.dtype), grad_out)
    theirs = block_attention.gradients(exact, whole, sums, grad_out.double())
    for mine, true in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        assert _gap(mine, true) <= bound


def test_shares_hold_every_token_once_in_order() -> None:
    device = torch.device("cpu")
    shares = [ContextShare(rank, 3).positions(4, device) for rank in range(3)]
    assert [share.tolist() for share in shares] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    whole = torch.arange(24).view(2, 12)
    assert torch.equal(ContextShare(1, 3).take(whole), whole[:, [2, 3, 8, 9]])
    assert torch.equal(ContextShare().take(whole), whole)
