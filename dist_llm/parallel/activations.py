"""How many bytes of activations are alive, at every operation: each storage from its birth to its death.

An activation is what is neither a parameter, a gradient or optimizer state nor a buffer in which ZeRO gathers or
reduces. Works on real tensors and on those that have only shapes (FakeTensorMode below it).
Storages are known by what touches them: FSDP's own operations, collectives over its axes, `exclude`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dist_llm.runtime.reduce_scatter import NAMESPACE

_REDUCING = {
    "c10d.allreduce_.default",
    "c10d._allgather_base_.default",
    "c10d._reduce_scatter_base_.default",
    f"{NAMESPACE}.reduce_scatter.default",
}
"""How ZeRO gathers and reduces; over the same ranks, tokens travel by sends and all-to-alls."""


def _local_tensors(tree: object) -> Iterable[Tensor]:
    for leaf in tree_iter(tree):
        if isinstance(leaf, Tensor):
            yield leaf.to_local() if isinstance(leaf, DTensor) else leaf


class ActivationLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes births and deaths of the storages that operations make while it is entered.

    state_groups: names of the process groups over which ZeRO gathers and reduces.
    """

    def __init__(self, state_groups: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._groups = frozenset(state_groups)
        self._events: list[tuple[int, int]] = []
        self._number: dict[int, int] = {}
        self._deaths: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._state: set[int] = set()
        self._births = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it made."""
        for tensor in _local_tensors((args, kwargs)):
            self._see(tensor, born=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _local_tensors(out):
            self._see(tensor, born=True)
        if func.namespace == "fsdp" or (str(func) in _REDUCING and self._over_state(args)):
            self.exclude(_local_tensors((args, kwargs, out)))
        return out

    def exclude(self, tensors: Iterable[Tensor | None]) -> None:
        """Say that what holds these tensors is no activation, from its birth on."""
        for tensor in tensors:
            if tensor is not None:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                number = self._number.get(local.untyped_storage()._cdata)
                if number is not None:
                    self._state.add(number)

    def mark(self) -> int:
        """Return a point in time."""
        return len(self._events)

    def level(self, at: int) -> int:
        """Return the bytes alive at a point in time."""
        return self._walk(0, at)[0]

    def peak(self, start: int, end: int) -> int:
        """Return the most bytes that were alive at once between two points in time."""
        before = self.level(start)
        return before + self._walk(start, end)[1]

    def _walk(self, start: int, end: int) -> tuple[int, int]:
        level = most = 0
        for number, change in self._events[start:end]:
            if number not in self._state:
                level += change
                most = max(most, level)
        return level, most

    def _over_state(self, args: tuple[Any, ...]) -> bool:
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        names = {_group_name(group) for group in groups} | {arg for arg in args if isinstance(arg, str)}
        return bool(names & self._groups)

    def _see(self, tensor: Tensor, born: bool) -> None:
        """Follow a storage that is new here; what an operation reads and none has made was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._number or storage.nbytes() == 0:
            return
        number, size = self._births, storage.nbytes()
        self._births += 1
        self._number[key] = number
        self._deaths[number] = weakref.ref(storage, partial(self._die, key, number, size))
        self._events.append((number, size))
        if not born:
            self._state.add(number)

    def _die(self, key: int, number: int, size: int, _: object) -> None:
        self._events.append((number, -size))
        del self._number[key], self._deaths[number]


def _group_name(group: Any) -> str:
    try:
        name: str = torch.distributed.ProcessGroup.unbox(group).group_name
    except RuntimeError:
        return ""
    return name
