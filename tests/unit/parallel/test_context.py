"""Attention over context ranks is attention: any method, heads, documents; what is sent when, and what ever lives."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dist_llm.ops import block_attention, fused_attention
from dist_llm.ops.context_share import ContextShare
from dist_llm.parallel import context, ring
from dist_llm.parallel.ring import Meeting, RingAttention, RingDocuments
from tests.unit.parallel.threads import context_axes, network

T, D = 48, 4
Tensors = tuple[Tensor, ...]


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _inputs(heads: int, groups: int, length: int = T, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return query, key, value and the gradient of the output, of whole sequences."""
    return [_random(2, n, length, D, seed=n + i, dtype=dtype) for i, n in enumerate((heads, groups, groups, heads))]


def _documents() -> Tensor:
    """One sequence of four documents, of which one is a chunk of four ranks, and one sequence of one document."""
    return torch.stack((torch.tensor([0] * 18 + [1] * 6 + [2] * 5 + [3] * 19), torch.zeros(T, dtype=torch.int64)))


def _one_process(inputs: list[Tensor], documents: Tensor | None) -> Tensors:
    query, key, value = (x.clone().requires_grad_() for x in inputs[:3])
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3])


def _over_ranks(inputs: list[Tensor], ranks: int, heads: int, documents: Tensor | None) -> Tensors:
    """Return output and gradients of whole sequences, from each rank its share."""

    def job(rank: int) -> Tensors:
        attention = context.build_attention(context_axes(rank, ranks, heads))
        mine = ContextShare(rank, ranks).positions(T // ranks, torch.device("cpu"))
        query, key, value = (x[:, :, mine].clone().requires_grad_() for x in inputs[:3])
        mask = None if documents is None else attention.mask(documents)
        out = attention(query, key, value, mask, 0.0)
        return out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3][:, :, mine])

    found = network(ranks).on_ranks(job)
    places = torch.cat([ContextShare(rank, ranks).positions(T // ranks, torch.device("cpu")) for rank in range(ranks)])
    return tuple(torch.cat(parts, dim=2)[:, :, places.argsort()] for parts in zip(*found, strict=True))


def _gap(ours: Tensors, theirs: Tensors) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("ranks", "heads", "groups"),
    [(2, 1, 2), (3, 1, 1), (4, 1, 4), (2, 2, 2), (4, 4, 2), (3, 3, 2), (4, 2, 2), (8, 2, 4), (8, 4, 1), (6, 3, 2)],
)
def test_all_ranks_together_are_one_process(ranks: int, heads: int, groups: int, masked: bool) -> None:
    """Rings, exchanged heads and their mix, with more and fewer key heads than ranks."""
    inputs = _inputs(12 if heads == 3 else 4, groups)
    documents = _documents() if masked else None
    assert _gap(_over_ranks(inputs, ranks, heads, documents), _one_process(inputs, documents)) <= 1e-14


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_low_precision_stays_near(heads: int, dtype: torch.dtype, bound: float) -> None:
    inputs = _inputs(4, 2, dtype=dtype)
    exact = _one_process([x.double() for x in inputs], _documents())
    assert _gap(_over_ranks(inputs, 4, heads, _documents()), exact) <= bound


def test_pieces_without_a_shared_document_are_not_computed() -> None:
    def meetings(documents: Tensor, rank: int) -> tuple[Meeting, ...]:
        return RingDocuments.of(documents, context_axes(rank, 4, 1).ring).meetings

    whole, part, none = Meeting.WHOLE, Meeting.PART, Meeting.NONE
    # Ranks 0 to 2 hold tokens of documents 0 and 3; rank 3 all of document 1, all of 2 and the first token of 3. The
    # keys that it sees of other ranks are of document 0.
    assert [meetings(_documents()[:1], rank) for rank in range(4)] == [(part,) * 4] * 3 + [(part, none, none, none)]
    assert meetings(_documents()[1:], 0) == (whole,) * 4
    assert meetings(_documents(), 3) == (part,) * 4
    assert meetings(torch.arange(T)[None], 2) == (part, none, none, none)


def test_what_is_sent_is_under_way_while_a_piece_is_computed() -> None:
    """Keys go before the piece and are waited for after it; gradients of a turn travel during the next one's piece."""
    ranks, inputs = 4, _inputs(4, 2)
    net = network(ranks)

    def noted(name: str, compute: Any) -> Any:
        def call(*args: Any) -> Any:
            net.say(name)
            return compute(*args)

        return call

    def job(rank: int) -> None:
        attention = RingAttention(context_axes(rank, ranks, 1).ring)
        query, key, value, grad = (x[:, :, :8].clone().requires_grad_() for x in inputs)
        attention(query, key, value, None, 0.0).backward(grad.detach())

    with (
        patch.object(ring, "attend", noted("compute", ring.attend)),
        patch.object(ring, "gradients", noted("compute", ring.gradients)),
    ):
        net.on_ranks(job)
    turn = ["post keys", "compute", "wait keys"]
    first = ["post keys", "compute", "post gradients", "wait keys"]
    middle = ["post keys", "compute", "wait gradients", "post gradients", "wait keys"]
    last = ["compute", "wait gradients", "post gradients", "wait gradients"]
    assert net.log == [[*turn * 3, "compute", *first, *middle * 2, *last]] * ranks


def test_a_piece_that_documents_leave_out_is_still_sent() -> None:
    """Whether a rank computes a piece is its own affair: what it sends does not depend on it."""
    net, inputs = network(4), _inputs(4, 2)

    def counted(*args: Any) -> Any:
        net.say("compute")
        return fused_attention.attend(*args)

    def job(rank: int) -> None:
        attention = RingAttention(context_axes(rank, 4, 1).ring)
        query, key, value, _ = (x[:1, :, : T // 4] for x in inputs)
        attention(query, key, value, attention.mask(_documents()[:1]), 0.0)

    with patch.object(ring, "attend", counted):
        net.on_ranks(job)
    assert [said.count("compute") for said in net.log] == [4, 4, 4, 1]
    assert [[word for word in said if word != "compute"] for said in net.log] == [["post keys", "wait keys"] * 3] * 4


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that live, and the elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
                self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out


def _live(length: int, fused: bool) -> list[_Live]:
    """Return what lives on each of two ranks in forward and backward over shares of `length` tokens."""

    def job(rank: int) -> _Live:
        attention = RingAttention(context_axes(rank, 2, 1).ring)
        query, key, value, grad = (_random(1, n, length, D, seed=n).requires_grad_() for n in (2, 1, 1, 2))
        with _Live() as live:
            attention(query, key, value, None, 0.0).backward(grad.detach())
        return live

    ways = fused_attention if fused else block_attention
    with patch.object(ring, "attend", ways.attend), patch.object(ring, "gradients", ways.gradients):
        found: list[_Live] = network(2).on_ranks(job)
    return found


def test_no_scores_of_a_whole_share_ever_live() -> None:
    """The reference holds tensors of length x length; the fused pieces nothing that grows faster than the length."""
    short, long, reference = _live(256, fused=True), _live(512, fused=True), _live(512, fused=False)
    for half, full, other in zip(short, long, reference, strict=True):
        assert other.largest >= 512 * 512
        assert full.largest == 2 * half.largest <= 512 * 8
        # What is under way to the other rank is counted too, and that is more or less by chance.
        assert full.peak <= 2.5 * half.peak
        assert full.peak * 20 <= other.peak
