"""Expert parallelism: the ranks of ep hold equal parts of the experts, and rows travel to theirs and back.

    counts by all-to-all, rows by all-to-all -> by source and expert -> sorted by expert -> experts -> the same way back

The ep axis is cut out of dp x cp, so its ranks hold other tokens and, but for experts, the same weights. Dropless: the
rows that a rank receives differ from step to step (Lepikhin et al. 2020; Gale et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dist_llm.ops.row_counts import row_counts
from dist_llm.runtime.mesh import Axis


def _exchange(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.way = (received, sent, axis)
        return _exchange(x, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], *ctx.way), None, None, None


class ExpertDispatch:
    """Brings rows to the rank that holds their expert."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def __call__(
        self, x: Float[Tensor, "rows width"], counts: Int64[Tensor, " experts"]
    ) -> tuple[Float[Tensor, "here width"], Int64[Tensor, " experts_here"], Callable[[Tensor], Tensor]]:
        """Return the rows for this rank's experts, sorted by expert, their counts, and what sends rows back.

        Three all-to-alls over ep, one of them for counts, and two of rows on the way back.
        """
        axis = self._axis
        outgoing = counts.view(axis.size, -1).contiguous()
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=axis.group)
        sent, received = (row_counts(way.sum(1), x.shape[0]) for way in (outgoing, incoming))
        came: Tensor = _AllToAllRows.apply(x, sent, received, axis)  # type: ignore[no-untyped-call]
        experts = torch.arange(incoming.shape[1], device=x.device).repeat(axis.size)
        order = experts.repeat_interleave(incoming.flatten(), output_size=sum(received)).argsort(stable=True)

        def back(out: Tensor) -> Tensor:
            unsorted = torch.empty_like(order)
            unsorted[order] = torch.arange(order.numel(), device=order.device)
            home: Tensor = _AllToAllRows.apply(out[unsorted], received, sent, axis)  # type: ignore[no-untyped-call]
            return home

        return came[order], incoming.sum(0), back


def apply_expert(model: nn.Module, axis: Axis) -> None:
    """Make layers of experts send their rows over ep, in place; the plan cuts their weights. Issues nothing now."""
    if axis.size == 1:
        return
    for module in model.modules():
        if hasattr(module, "dispatch"):
            module.dispatch = ExpertDispatch(axis)  # type: ignore[assignment]
