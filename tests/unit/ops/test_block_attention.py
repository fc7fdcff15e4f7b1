"""Pieces of attention add up to attention: outputs, log-sum-exps, gradients; zig-zag shares hold every token once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.block_attention import Piece, attend, gradients, merge
from dist_llm.ops.context_share import ContextShare

B, G, R, T, D = 2, 2, 3, 8, 4


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    return _random(B, G, R, T, D, seed=1), _random(B, G, T, D, seed=2), _random(B, G, T, D, seed=3)


def _reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    out = functional.scaled_dot_product_attention(query.flatten(1, 2), key, value, attn_mask=mask, enable_gqa=True)
    return out.unflatten(1, (G, R))


def _halves(mask: Tensor) -> list[tuple[slice, Tensor]]:
    return [(keys, mask[..., keys]) for keys in (slice(None, T // 2), slice(T // 2, None))]


def test_halves_of_the_keys_merge_to_the_whole() -> None:
    query, key, value = _inputs()
    # The second half is not seen at all by the first queries: its log-sum-exp there is -inf.
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    (first, first_mask), (second, second_mask) = _halves(mask)
    out, lse = attend(Piece(query, key[:, :, first], value[:, :, first], first_mask, causal=False))
    more = attend(Piece(query, key[:, :, second], value[:, :, second], second_mask, causal=False))
    assert torch.isinf(more[1][..., 0]).all()
    merged, whole_lse = merge(out, lse, *more)
    torch.testing.assert_close(merged, _reference(query, key, value, mask))
    torch.testing.assert_close(whole_lse, attend(Piece(query, key, value, None, causal=True))[1])


def test_gradients_of_the_halves_add_up() -> None:
    query, key, value = (x.requires_grad_() for x in _inputs())
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    out = _reference(query, key, value, mask)
    grad_out = _random(*out.shape, seed=4)
    out.backward(grad_out)
    with torch.no_grad():
        lse = attend(Piece(query, key, value, None, causal=True))[1]
        delta = (grad_out * out).sum(dim=-1)
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for keys, part in _halves(mask):
            more = gradients(Piece(query, key[:, :, keys], value[:, :, keys], part, causal=False), lse, grad_out, delta)
            grad_query += more[0]
            grad_key[:, :, keys] += more[1]
            grad_value[:, :, keys] += more[2]
    for ours, tensor in ((grad_query, query), (grad_key, key), (grad_value, value)):
        torch.testing.assert_close(ours, tensor.grad)


def test_shares_hold_every_token_once_in_order() -> None:
    device = torch.device("cpu")
    shares = [ContextShare(rank, 3).positions(4, device) for rank in range(3)]
    assert [share.tolist() for share in shares] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    whole = torch.arange(24).view(2, 12)
    assert torch.equal(ContextShare(1, 3).take(whole), whole[:, [2, 3, 8, 9]])
    assert torch.equal(ContextShare().take(whole), whole)
