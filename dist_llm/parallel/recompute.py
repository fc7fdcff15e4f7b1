"""Activation recompute: what a backward needs is dropped after the forward and computed again (Chen et al. 2016).

    full         a block keeps its input alone
    selective    a block keeps all but what the listed operators saved (Korthikanti et al. 2022)

A cheap operator's result is mostly the saved input of the next linear, so with `gives_up` it goes too: a saved tensor
that lies in the storage of such a result is replaced by what computes it. All of a call is computed again once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dist_llm.types import Recomputable

Function = Callable[..., Any]


def _recomputed(function: Function) -> Function:
    """Return the function, its saved tensors dropped; the collectives before the last of them are issued again."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
        return out

    return run


class _Call:
    """A call of a function that draws no random numbers: its saved tensors and its result, when a backward asks."""

    def __init__(self, function: Function, args: Sequence[Tensor | None]) -> None:
        self._function = function
        self._args = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in args]
        self._again: tuple[list[Tensor], Tensor] | None = None

    def run(self, args: Sequence[Tensor | None]) -> Tensor:
        """Return the result; what the call saves is replaced by its number."""
        numbers = count()
        with saved_tensors_hooks(lambda tensor: next(numbers), self.saved):
            out: Tensor = self._function(*args)
        return out

    def saved(self, number: int) -> Tensor:
        """Return a tensor that the call saved."""
        return self._compute()[0][number]

    def result(self) -> Tensor:
        """Return the result."""
        return self._compute()[1]

    def _compute(self) -> tuple[list[Tensor], Tensor]:
        if self._again is None:
            saved: list[Tensor] = []
            with torch.enable_grad(), saved_tensors_hooks(lambda x: saved.append(x.detach()), lambda nothing: nothing):
                self._again = saved, self._function(*self._args).detach()
        return self._again


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Return what tells the tensor's storage from others; it keeps the address from being taken by another one."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class _Kept:
    """What the operations of a block save, between its forward and its backward."""

    def __init__(self) -> None:
        self._calls: dict[StorageWeakRef, tuple[_Call, int]] = {}
        self._looks = False

    def block(self, forward: Function) -> Function:
        """Return a block's forward, whose operations do not save the results that are given up."""

        def run(*args: Any, **kwargs: Any) -> Tensor:
            out: Tensor
            if torch.compiler.is_compiling():
                out = forward(*args, **kwargs)
                return out
            try:
                self._looks = True
                with saved_tensors_hooks(self._pack, self._unpack):
                    out = forward(*args, **kwargs)
            finally:
                self._looks = False
                self._calls.clear()
            return out

        return run

    def function(self, function: Function) -> Function:
        """Return the function; what it saves and its result are given up.

        Where the block does not look (it was compiled, and this part of it was not) the result stays.
        """
        traced = _recomputed(function)

        def run(*args: Tensor | None) -> Tensor:
            out: Tensor
            if not torch.is_grad_enabled():
                out = function(*args)
                return out
            if torch.compiler.is_compiling() or not self._looks:
                out = traced(*args)
                return out
            call = _Call(function, args)
            out = call.run(args)
            self._calls[_storage(out)] = call, int(out.storage_offset())
            return out

        return run

    def _pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        found = self._calls.get(_storage(tensor))
        if found is None:
            kept = tensor.detach()
            return lambda: kept
        call, start = found
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset() - start
        return lambda: call.result().as_strided(size, stride, offset)

    @staticmethod
    def _unpack(packed: Callable[[], Tensor]) -> Tensor:
        return packed()


def apply_full_recompute(blocks: Iterable[nn.Module]) -> None:
    """Make each block drop all but its input, in place.

    A backward then issues the collectives of the block again, up to the last tensor that it saves.
    """
    for block in blocks:
        block.forward = _recomputed(block.forward)


def apply_selective_recompute(blocks: Iterable[nn.Module], operators: Sequence[Recomputable]) -> None:
    """Make each block drop what the operators save, in place.

    A backward then issues the collectives inside an operator again, up to the last tensor that it saves. In a compiled
    block the compiler decides what else is computed again; what an operator gives up it does not keep either.
    """
    for block in blocks:
        kept = _Kept()
        for operator in operators:
            for path, module in block.named_modules():
                if fnmatchcase(path, operator.module) and hasattr(module, operator.function):
                    wrap = kept.function if operator.gives_up else _recomputed
                    setattr(module, operator.function, wrap(getattr(module, operator.function)))
        if any(operator.gives_up for operator in operators):
            block.forward = kept.block(block.forward)
