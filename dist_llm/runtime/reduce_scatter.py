"""Reduce-scatter: the backend's own, but on a CPU an exchange of parts, which each rank then adds up.

    gloo's own    all-reduces the whole, of which a rank keeps a part    2 (n - 1) / n of the payload leave a rank
    exchange      part j goes to rank j, which adds up what came         (n - 1) / n, in one round

It is an operator of its own, so that whoever watches torch's dispatcher sees a reduce-scatter and not an all-to-all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

NAMESPACE = "dist_llm_c10d"
"""Of torch's operators, for collectives."""

_backend_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_library.define("reduce_scatter(Tensor(a!) out, Tensor x, str group) -> ()")


def reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> None:
    """Put the sum over the group of this rank's part of x, cut along dim 0, into out. Issues one reduce-scatter.

    Both are contiguous; on a CPU parts are added in the order of ranks. What is no sum is left to the backend.
    """
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and op == dist.ReduceOp.SUM:
        torch.ops.dist_llm_c10d.reduce_scatter(out, x, group.group_name)
    else:
        _backend_reduce_scatter(out, x, op=op, group=group)


def _exchange(out: Tensor, x: Tensor, group: Any) -> None:
    """Exchange parts and add them up."""
    ranks = _resolve_process_group(group)
    came = torch.empty_like(x)
    dist.all_to_all_single(came, x, group=ranks)
    parts = came.view(ranks.size(), *out.shape)
    if ranks.size() == 2:
        torch.add(parts[0], parts[1], out=out)
    else:
        torch.sum(parts, 0, out=out)


def _nothing(out: Tensor, x: Tensor, group: str) -> None:
    """Tensors without values stay as they are."""


_library.impl("reduce_scatter", _exchange, "CPU")
_library.impl("reduce_scatter", _nothing, "Meta")
