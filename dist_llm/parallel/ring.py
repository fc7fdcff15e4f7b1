"""Ring attention: keys and values travel from rank to rank while each computes with those it has (Liu et al. 2023).

    turn          0            1           ...    n - 1
    forward       k, v sent    k, v sent          -            computed in each turn while k, v of the next come
    backward      the same; the gradients of k and v follow one turn behind, n sends, and end where k and v began

Every rank holds the zig-zag share of ops/context_share.py, so turns after the first are equal work: either half of
the keys lie after all queries here, or half of the queries before all keys. Pieces merge by their log-sum-exp in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dist_llm.ops.block_attention import Piece, default_scale, merge, wide
from dist_llm.ops.context_share import ContextShare
from dist_llm.ops.fused_attention import attend, gradients
from dist_llm.ops.row_counts import has_values
from dist_llm.runtime.mesh import Axis


class Meeting(Enum):
    """What documents leave of the piece of a turn."""

    WHOLE = "whole"
    """Queries and keys are of one document: no mask is needed."""
    PART = "part"
    NONE = "none"
    """No query shares a document with a key: nothing is computed."""


@dataclass(frozen=True)
class Turn:
    """Whose keys meet the queries here in a turn, and which of both: others would be masked."""

    source: int
    queries: slice
    keys: slice

    @classmethod
    def at(cls, axis: Axis, number: int, part: int) -> Turn:
        """Return turn `number` of this rank, shares being of `part` tokens."""
        source = (axis.index - number) % axis.size
        front, back = slice(None, part // 2), slice(part // 2, None)
        if source == axis.index:
            return cls(source, slice(None), slice(None))
        return cls(source, slice(None), front) if source < axis.index else cls(source, back, slice(None))


@dataclass(frozen=True)
class RingDocuments:
    """The document of each token of the share of every ring rank, and what that leaves of the piece of every turn.

    Found once for all layers; a mask is made of one piece at a time, so none is ever of the whole sequence.
    """

    shares: Int64[Tensor, "ranks batch part"]
    meetings: tuple[Meeting, ...]

    @classmethod
    def of(cls, documents: Int64[Tensor, "batch seq"], axis: Axis) -> RingDocuments:
        """Return what the documents of whole sequences mean on this rank. Waits for the device once."""
        part, n = documents.shape[1] // axis.size, axis.size
        shares = torch.stack([ContextShare(rank, n).take(documents) for rank in range(n)])
        if not has_values(shares):
            return cls(shares, (Meeting.PART,) * n)
        apart, alike = [], []
        for number in range(n):
            turn = Turn.at(axis, number, part)
            queries, keys = shares[axis.index][:, turn.queries], shares[turn.source][:, turn.keys]
            (first, last), (low, high) = queries.aminmax(dim=1), keys.aminmax(dim=1)
            # Apart where numbers do not overlap: two documents in turns would only cost a mask that hides all.
            apart.append(((last < low) | (high < first)).all())
            alike.append(((first == last) & (low == high) & (first == low)).all())
        flags = torch.stack((torch.stack(apart), torch.stack(alike))).tolist()
        kinds = [Meeting.NONE if a else Meeting.WHOLE if b else Meeting.PART for a, b in zip(*flags, strict=True)]
        return cls(shares, tuple(kinds))

    def mask(self, here: int, turn: Turn) -> Bool[Tensor, "batch 1 queries keys"]:
        """Return which of the piece's keys each of its queries sees."""
        queries, keys = self.shares[here][:, turn.queries], self.shares[turn.source][:, turn.keys]
        same = queries[:, None, :, None] == keys[:, None, None, :]
        return same.tril() if turn.source == here else same


class RingAttention:
    """Causal attention over the tokens of all ring ranks, each asking for its own."""

    traceable = False
    """Whether torch.compile can look inside: not where tensors are sent and received."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def mask(self, documents: Int64[Tensor, "batch seq"]) -> RingDocuments:
        """Return what confines attention to documents; `documents` is of the whole sequence."""
        return RingDocuments.of(documents, self._axis)

    def __call__(
        self,
        query: Float[Tensor, "batch heads part head"],
        key: Float[Tensor, "batch groups part head"],
        value: Float[Tensor, "batch groups part head"],
        mask: RingDocuments | None,
        drop: float,
    ) -> Float[Tensor, "batch heads part head"]:
        """Attend to the keys of all ranks. Sends and receives over the ring, see above. `drop` must be 0."""
        if drop:
            raise ValueError("ring attention has no dropout")
        out: Tensor = _Ring.apply(query, key, value, mask, self._axis)  # type: ignore[no-untyped-call]
        return out


class _Passing:
    """A tensor on its way to the next rank of the axis, and the previous one's on its way here."""

    def __init__(self, sent: Tensor, axis: Axis, tag: int = 0) -> None:
        # Both tensors live as long as this does: none is freed or written under a transfer.
        self._sent, self._received = sent, torch.empty_like(sent)
        following, preceding = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
        operations = [
            dist.P2POp(dist.isend, sent, group=axis.group, group_peer=following, tag=tag),
            dist.P2POp(dist.irecv, self._received, group=axis.group, group_peer=preceding, tag=tag),
        ]
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        """Return what came, when it has."""
        for work in self._works:
            work.wait()
        return self._received


_KEYS, _GRADIENTS = 0, 1
"""Tags that keep the two rings of a backward apart where messages are matched by tag (gloo)."""


class _Pieces:
    """The pieces of attention that this rank computes."""

    def __init__(self, query: Tensor, documents: RingDocuments | None, axis: Axis) -> None:
        self._query, self._documents, self._axis = query, documents, axis
        self._scale = default_scale(query.shape[-1])

    def at(self, number: int, pair: Tensor) -> tuple[Piece, Turn] | None:
        """Return what meets in a turn with the key/value pair that is here; None: nothing."""
        turn = Turn.at(self._axis, number, pair.shape[3])
        meeting = Meeting.WHOLE if self._documents is None else self._documents.meetings[number]
        if meeting is Meeting.NONE:
            return None
        mask = None
        if self._documents is not None and meeting is Meeting.PART:
            mask = self._documents.mask(self._axis.index, turn)
        query, key, value = self._query[:, :, turn.queries], pair[0][:, :, turn.keys], pair[1][:, :, turn.keys]
        return Piece(query, key, value, mask, causal=number == 0 and mask is None, scale=self._scale), turn


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: RingDocuments | None,
        axis: Axis,
    ) -> Tensor:
        into = wide(query.dtype)
        pair, pieces = torch.stack((key, value)), _Pieces(query, documents, axis)
        out, lse = query.new_empty(0, dtype=into), query.new_empty(0, dtype=into)
        for number in range(axis.size):
            coming = _Passing(pair, axis, _KEYS) if number < axis.size - 1 else None
            met = pieces.at(number, pair)
            if met is not None:
                more, more_lse = attend(met[0])
                mine = met[1].queries
                if number:
                    out[:, :, mine], lse[:, :, mine] = merge(out[:, :, mine], lse[:, :, mine], more, more_lse)
                else:
                    out, lse = more.to(into), more_lse.to(into)
            if coming is not None:
                pair = coming.wait()
        ctx.documents, ctx.axis = documents, axis
        whole = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, whole, lse)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        axis: Axis = ctx.axis
        pair, pieces = torch.stack((key, value)), _Pieces(query, ctx.documents, axis)
        grad_query = torch.zeros_like(query, dtype=wide(query.dtype))
        grad_pair, arriving = torch.zeros_like(pair, dtype=wide(query.dtype)), None
        for number in range(axis.size):
            coming = _Passing(pair, axis, _KEYS) if number < axis.size - 1 else None
            met = pieces.at(number, pair)
            more = None
            if met is not None:
                mine = met[1].queries
                more = gradients(met[0], out[:, :, mine], lse[:, :, mine], grads[0][:, :, mine])
            if arriving is not None:
                grad_pair = arriving.wait()
            if met is not None and more is not None:
                grad_query[:, :, met[1].queries] += more[0]
                grad_pair[0][:, :, met[1].keys] += more[1]
                grad_pair[1][:, :, met[1].keys] += more[2]
            arriving = _Passing(grad_pair, axis, _GRADIENTS)
            if coming is not None:
                pair = coming.wait()
        grad_key, grad_value = (arriving.wait() if arriving is not None else grad_pair).to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None
