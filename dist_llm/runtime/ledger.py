"""Counts the collectives that reach torch's dispatcher, whoever issues them: by process group and kind, with bytes.

    payload   the larger of an operation's two buffers: the tensor of an all-reduce, the output of an all-gather, the
              input of a reduce-scatter or an all-to-all, the tensor of a send
    sent      what a rank of n sends of it round a ring: (n - 1) / n of the payload, of an all-reduce twice that; all
              of a send

A batch of sends is counted one by one, a receive not at all, a coalesced operation once with all its tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from dist_llm.runtime.reduce_scatter import NAMESPACE

_SPELLINGS = {
    "all_reduce": ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_", "all_reduce_coalesced"),
    "all_gather": (
        "_allgather_base_",
        "allgather_",
        "allgather_coalesced_",
        "allgather_into_tensor_coalesced_",
        "all_gather_into_tensor",
        "all_gather_into_tensor_out",
        "all_gather_into_tensor_coalesced",
    ),
    "reduce_scatter": (
        "_reduce_scatter_base_",
        "reduce_scatter_",
        "reduce_scatter",
        "reduce_scatter_tensor_coalesced_",
        "reduce_scatter_tensor",
        "reduce_scatter_tensor_out",
        "reduce_scatter_tensor_coalesced",
    ),
    "all_to_all": ("alltoall_base_", "alltoall_", "all_to_all_single"),
    "send": ("send", "isend"),
    "broadcast": ("broadcast_", "broadcast"),
    "reduce": ("reduce_",),
    "gather": ("gather_",),
    "scatter": ("scatter_",),
    "barrier": ("barrier", "monitored_barrier_"),
}
_SPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", NAMESPACE)
KINDS = {
    f"{space}.{spelling}.default": kind
    for kind, spellings in _SPELLINGS.items()
    for spelling in spellings
    for space in _SPACES
}
"""Name of each of torch's operators to the kind of collective that it is."""
QUIET = {
    *(f"c10d.{name}.default" for name in ("recv_", "recv_any_source_", "check_for_nan")),
    *(f"_c10d_functional.{name}.default" for name in ("irecv", "wait_tensor", "_wrap_tensor_autograd")),
}
"""Operators that send nothing."""
_LEAVING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1, "reduce": 1}

Key = tuple[str, str]
"""(name of the process group, kind)."""


class CollectiveLedger(TorchDispatchMode):
    """Records every collective that is issued inside it; an unknown one is recorded under torch's name of it.

    names: what to call a process group, by torch's name of it; others keep theirs.
    """

    def __init__(self, names: dict[str, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names or {}
        self.counts: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()
        self.sent: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.partition(".")[0] in _SPACES and name not in QUIET:
            self._record(name, args)
        return func(*args, **(kwargs or {}))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self, name: str, args: Any) -> None:
        group, kind = _group_of(args), KINDS.get(name, name)
        key = (self._names.get(group.group_name, group.group_name), kind)
        payload, size = _payload(name, kind, args, group.size()), group.size()
        self.counts[key] += 1
        self.bytes[key] += payload
        self.sent[key] += payload if kind == "send" else payload * _LEAVING.get(kind, 1) * (size - 1) // size

    def by_kind(self) -> dict[str, list[int]]:
        """Return number, payload bytes and sent bytes of every kind, over all groups."""
        found: dict[str, list[int]] = {}
        for key, count in sorted(self.counts.items(), key=lambda entry: entry[0][1]):
            row = found.setdefault(key[1], [0, 0, 0])
            for place, more in enumerate((count, self.bytes[key], self.sent[key])):
                row[place] += more
        return found


def _group_of(args: Sequence[Any]) -> dist.ProcessGroup:
    """Return the process group of a collective: boxed among its arguments, or the last of them by name."""
    boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
    # Where there are two the first is the group, the other the operation of a reduction.
    group: dist.ProcessGroup = dist.ProcessGroup.unbox(boxed[0]) if boxed else _resolve_process_group(args[-1])
    return group


def _payload(name: str, kind: str, args: Sequence[Any], size: int) -> int:
    """Return the payload bytes of a collective over `size` ranks."""
    if kind == "barrier":
        return 0
    sizes = [_tensor_bytes(arg) for arg in args if _holds_tensor(arg)]
    if kind == "all_to_all":
        # The input comes last.
        return sizes[-1]
    functional_gather = kind == "all_gather" and not name.startswith("c10d.")
    return max(sizes, default=0) * (size if functional_gather else 1)


def _holds_tensor(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) or (isinstance(arg, list | tuple) and any(map(_holds_tensor, arg)))


def _tensor_bytes(arg: Any) -> int:
    """Return the bytes of a tensor, or of all tensors in (nested) lists."""
    if isinstance(arg, torch.Tensor):
        return arg.nbytes
    return sum(map(_tensor_bytes, arg)) if isinstance(arg, list | tuple) else 0
