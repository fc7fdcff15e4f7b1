"""Context parallelism: each rank holds a zig-zag share of every sequence (ops/context_share.py); attention joins them.

    ranks of context, u = 2 that exchange heads, rings of n = 2:      r0 r1 | r2 r3     all-to-all inside |, ring across

ring      u = 1: keys and values travel from rank to rank while each computes, parallel/ring.py; any number of heads
ulysses   n = 1: an all-to-all gives each rank all tokens of some heads, another takes them back (Jacobs et al. 2023)
mixed     both: after the all-to-all neighbours hold one larger zig-zag share, which goes round (Fang & Zhao 2024)

    all-to-all: one of q, k and v and one of the output, forward and backward; ring: see parallel/ring.py
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dist_llm.ops.causal_attention import Attend, CausalAttention
from dist_llm.ops.context_share import ContextShare
from dist_llm.parallel.ring import RingAttention
from dist_llm.runtime.mesh import Axis, ContextAxes


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
    """Attention, by another, of this rank's part of the heads for the tokens of all ranks of the axis.

    Key/value heads that are fewer than the ranks, or do not divide among them, are repeated until they do.
    """

    def __init__(self, axis: Axis, inner: Attend) -> None:
        self._axis, self._inner = axis, inner

    @property
    def traceable(self) -> bool:
        """Whether torch.compile can look inside."""
        return self._inner.traceable

    def mask(self, documents: Int64[Tensor, "batch seq"]) -> Any:
        """Return what confines attention to documents; `documents` is of the whole sequence."""
        return self._inner.mask(documents)

    def __call__(
        self,
        query: Float[Tensor, "batch heads part head"],
        key: Float[Tensor, "batch groups part head"],
        value: Float[Tensor, "batch groups part head"],
        mask: Any,
        drop: float,
    ) -> Float[Tensor, "batch heads part head"]:
        """Attend to the keys of all ranks. Two all-to-alls over the axis, and two on the way back. `drop` must be 0."""
        if drop:
            raise ValueError("attention over context ranks has no dropout")
        part, order = query.shape[2], self._order(query.shape[2], query.device)
        key, value = (self._repeated(x) for x in (key, value))
        # [rank, batch, heads of that rank, part, head]; q, k and v go together.
        split = [torch.unflatten(x, 1, (self._axis.size, -1)).movedim(1, 0) for x in (query, key, value)]
        came = _exchange(torch.cat(split, dim=2), self._axis)
        whole = came.movedim(0, 2).flatten(2, 3)[:, :, order.argsort()]
        q, k, v = torch.split(whole, [x.shape[2] for x in split], dim=1)
        out = self._inner(q, k, v, mask, drop)
        return self._returned(torch.unflatten(out[:, :, order], 2, (self._axis.size, part)).movedim(2, 0))

    def _repeated(self, x: Float[Tensor, "batch groups part head"]) -> Float[Tensor, "batch copies part head"]:
        """Return key/value heads as often as every rank's query heads then find theirs there."""
        copies = math.lcm(x.shape[1], self._axis.size) // x.shape[1]
        return x.repeat_interleave(copies, dim=1) if copies > 1 else x

    def _returned(self, out: Float[Tensor, "ranks batch some part head"]) -> Float[Tensor, "batch heads part head"]:
        """Send the output of tokens to the ranks that asked; return all heads of this rank's tokens."""
        return _exchange(out, self._axis).movedim(0, 1).flatten(1, 2)

    def _order(self, part: int, device: torch.device) -> Int64[Tensor, " seq"]:
        """Return the places, among the tokens of the axis in ascending order, of those of rank 0, then 1, ..."""
        n = self._axis.size
        return torch.cat([ContextShare(rank, n).positions(part, device) for rank in range(n)])


def build_attention(axes: ContextAxes) -> Attend:
    """Return attention over the context axes; plain attention where a rank holds all tokens."""
    if axes.whole.size == 1:
        return CausalAttention()
    if axes.heads.size == 1:
        return RingAttention(axes.ring)
    return UlyssesAttention(axes.heads, CausalAttention() if axes.ring.size == 1 else RingAttention(axes.ring))


def apply_context(model: nn.Module, axes: ContextAxes) -> None:
    """Make the modules of a single-device model work on this rank's share of the tokens, in place. Issues nothing now.

    A module with `attend` gets attention over the context axes; one with `context` is told which tokens it sees.
    """
    if axes.whole.size == 1:
        return
    attention = build_attention(axes)
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = attention  # type: ignore[assignment]
        if hasattr(module, "context"):
            module.context = ContextShare(axes.whole.index, axes.whole.size)  # type: ignore[assignment]
