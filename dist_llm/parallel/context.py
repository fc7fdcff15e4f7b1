"""Context parallelism: each rank holds a zig-zag share of every sequence (ops/context_share.py); attention joins them.

ring      keys and values travel from rank to rank while each computes (Liu et al. 2023); any number of heads
ulysses   an all-to-all gives each rank all tokens of some heads, and another gives them back (Jacobs et al. 2023)

    ring      forward n - 1 sends of k and v; backward n - 1 of them again and n of their gradients
    ulysses   one all-to-all of q, k and v and one of the output, forward and backward
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from dist_llm.ops.block_attention import Piece, attend, gradients, merge
from dist_llm.ops.context_share import ContextShare
from dist_llm.runtime.mesh import Axis


def _same_document(
    documents: Int64[Tensor, "batch seq"], queries: Int64[Tensor, " queries"]
) -> Bool[Tensor, "batch 1 queries seq"]:
    """Return whether a key is not later than the query at position `queries` and in its document."""
    length = documents.shape[1]
    same = documents[:, queries, None] == documents[:, None, :]
    return (same & (torch.arange(length, device=documents.device) <= queries[:, None]))[:, None]


class RingAttention:
    """Causal attention over the tokens of all cp ranks, each asking for its own: log-sum-exp merged over the ring."""

    def __init__(self, axis: Axis) -> None:
        self._axis, self._share = axis, ContextShare(axis.index, axis.size)

    def mask(self, documents: Int64[Tensor, "batch seq"]) -> Bool[Tensor, "batch 1 queries seq"]:
        """Return which keys of the whole sequence each query of this rank sees; `documents` is of the whole."""
        return _same_document(documents, self._share.positions(documents.shape[1] // self._axis.size, documents.device))

    def __call__(
        self,
        query: Float[Tensor, "batch heads queries head"],
        key: Float[Tensor, "batch groups queries head"],
        value: Float[Tensor, "batch groups queries head"],
        mask: Bool[Tensor, "batch 1 queries seq"] | None,
        drop: float,
    ) -> Float[Tensor, "batch heads queries head"]:
        """Attend to the keys of all ranks. Sends and receives over cp, see above. `drop` must be 0."""
        if drop:
            raise ValueError("ring attention has no dropout")
        out: Tensor = _Ring.apply(query, key, value, mask, self._axis)  # type: ignore[no-untyped-call]
        return out


class _Circle:
    """Passes tensors to the next rank of the axis while this one computes."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def start(self, sent: Tensor, tag: int = 0) -> tuple[Tensor, list[dist.Work]]:
        """Send to the next rank; return where the previous one's arrives, and what to wait for."""
        received, axis = torch.empty_like(sent), self._axis
        following, preceding = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
        operations = [
            dist.P2POp(dist.isend, sent, group=axis.group, group_peer=following, tag=tag),
            dist.P2POp(dist.irecv, received, group=axis.group, group_peer=preceding, tag=tag),
        ]
        return received, dist.batch_isend_irecv(operations)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class _Turns:
    """The pieces of attention that a rank computes, one for each rank whose keys come round."""

    def __init__(self, query: Tensor, mask: Tensor | None, axis: Axis) -> None:
        self._query, self._mask, self._axis = query, mask, axis

    def piece(self, turn: int, pair: Tensor) -> tuple[Piece, slice, slice]:
        """Return what meets in a turn with the key/value pair that is here, and which queries and keys these are.

        Half of an earlier rank's keys lie before all queries here, half after them; with a later rank's it is the
        queries of which one half sees all keys and the other none. So all turns after the first are equal work.
        """
        n, here = self._axis.size, self._axis.index
        source = (here - turn) % n
        whole, half = slice(None), pair.shape[3] // 2
        queries = slice(half, None) if source > here else whole
        keys = slice(None, half) if source < here else whole
        mask = None
        if self._mask is not None:
            columns = ContextShare(source, n).positions(pair.shape[3], pair.device)[keys]
            mask = self._mask[:, :, queries][..., columns]
        key, value = pair[0, :, :, keys], pair[1, :, :, keys]
        return Piece(self._query[..., queries, :], key, value, mask, causal=turn == 0), queries, keys


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, axis: Axis) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        grouped = torch.unflatten(query, 1, (key.shape[1], -1)).to(wide)
        pair = torch.stack((key, value))
        turns, circle = _Turns(grouped, mask, axis), _Circle(axis)
        out, lse = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:-1])
        for turn in range(axis.size):
            coming, works = circle.start(pair) if turn < axis.size - 1 else (pair, [])
            piece, queries, _ = turns.piece(turn, pair.to(wide))
            more, more_lse = attend(piece)
            if turn == 0:
                out, lse = more, more_lse
            else:
                out[..., queries, :], lse[..., queries] = merge(out[..., queries, :], lse[..., queries], more, more_lse)
            _wait(works)
            pair = coming
        ctx.axis = axis
        ctx.save_for_backward(query, key, value, mask, out, lse)
        return out.flatten(1, 2).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask, out, lse = ctx.saved_tensors
        axis: Axis = ctx.axis
        grouped, grad_out = (torch.unflatten(x, 1, out.shape[1:3]).to(out.dtype) for x in (query, grads[0]))
        delta = (grad_out * out).sum(dim=-1)
        turns, circle = _Turns(grouped, mask, axis), _Circle(axis)
        grad_query, pair = torch.zeros_like(grouped), torch.stack((key, value))
        grad_pair = pair.new_zeros(pair.shape, dtype=out.dtype)
        arriving: list[dist.Work] = []
        for turn in range(axis.size):
            coming, works = circle.start(pair) if turn < axis.size - 1 else (pair, [])
            piece, queries, keys = turns.piece(turn, pair.to(out.dtype))
            more = gradients(piece, lse[..., queries], grad_out[..., queries, :], delta[..., queries])
            grad_query[..., queries, :] += more[0]
            _wait(arriving)
            grad_pair[0, :, :, keys] += more[1]
            grad_pair[1, :, :, keys] += more[2]
            grad_pair, arriving = circle.start(grad_pair, tag=1)
            _wait(works)
            pair = coming
        _wait(arriving)
        grad_key, grad_value = grad_pair.to(key.dtype)
        return grad_query.flatten(1, 2).to(query.dtype), grad_key, grad_value, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, grads[0].contiguous(), group=ctx.axis.group)
        return out, None


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    """Send x[i] to rank i; return what each rank sent here, in rank order. Issues one all-to-all."""
    out: Tensor = _AllToAll.apply(x, axis)  # type: ignore[no-untyped-call]
    return out


class UlyssesAttention:
    """Causal attention of all tokens for this rank's part of the heads; the share of tokens comes in and goes out."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def mask(self, documents: Int64[Tensor, "batch seq"]) -> Bool[Tensor, "batch 1 seq seq"]:
        """Return which keys of the whole sequence each of its queries sees."""
        return _same_document(documents, torch.arange(documents.shape[1], device=documents.device))

    def __call__(
        self,
        query: Float[Tensor, "batch heads part head"],
        key: Float[Tensor, "batch groups part head"],
        value: Float[Tensor, "batch groups part head"],
        mask: Bool[Tensor, "batch 1 seq seq"] | None,
        drop: float,
    ) -> Float[Tensor, "batch heads part head"]:
        """Attend to the keys of all ranks. Two all-to-alls over cp, and two on the way back. `drop` must be 0."""
        if drop:
            raise ValueError("attention over context ranks has no dropout")
        n, part = self._axis.size, query.shape[2]
        # [rank, batch, heads of that rank, part, head]; q, k and v go together.
        split = [torch.unflatten(x, 1, (n, -1)).movedim(1, 0) for x in (query, key, value)]
        sizes = [x.shape[2] for x in split]
        came = _exchange(torch.cat(split, dim=2), self._axis)
        order = self._order(part, query.device)
        whole = came.movedim(0, 2).flatten(2, 3)[:, :, order.argsort()]
        grouped = sizes[0] != sizes[1]
        q, k, v = torch.split(whole, sizes, dim=1)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        back = torch.unflatten(out[:, :, order], 2, (n, part)).movedim(2, 0)
        return _exchange(back, self._axis).movedim(0, 1).flatten(1, 2)

    def _order(self, part: int, device: torch.device) -> Int64[Tensor, " seq"]:
        """Return the positions of all tokens in the order of ranks."""
        n = self._axis.size
        return torch.cat([ContextShare(rank, n).positions(part, device) for rank in range(n)])


def apply_context(model: nn.Module, axis: Axis, method: Literal["ring", "ulysses"]) -> None:
    """Make the modules of a single-device model work on this rank's share of the tokens, in place. Issues nothing now.

    A module with `attend` gets attention over the cp axis; one with `context` is told which tokens it sees.
    """
    if axis.size == 1:
        return
    attention = RingAttention(axis) if method == "ring" else UlyssesAttention(axis)
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = attention  # type: ignore[assignment]
        if hasattr(module, "context"):
            module.context = ContextShare(axis.index, axis.size)  # type: ignore[assignment]
