"""Megatron-Core on a CPU: a stand-in for `torch` in its modules, where it takes a CUDA device for granted.

    torch.cuda.current_device()   the CPU            device="cuda"   the CPU
    CUDA generators, streams      torch's own, none  parameter.type()  as on a device

Only the modules of Megatron-Core see it: everyone else's torch, and every tensor, are left as they are. On CUDA nothing
here is used.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "rand", "tensor", "zeros", "zeros_like")
_TYPES = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor", torch.float16: "HalfTensor"}


class _CpuTorch(ModuleType):
    """torch, but for what needs a CUDA device."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _CpuCuda(SimpleNamespace):
    """torch.cuda, as far as Megatron-Core's training needs it."""

    def __init__(self) -> None:
        super().__init__(
            current_device=lambda: torch.device("cpu"),
            current_stream=lambda *args: _Stream(),
            default_stream=lambda *args: _Stream(),
            Stream=_Stream,
            stream=lambda stream: contextlib.nullcontext(),
            synchronize=lambda *args: None,
            get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Stream:
    """A queue that is always empty: on a CPU work is done when it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.wait_stream = self.synchronize = lambda *args: None


class _Tracker:
    """Megatron-Core's generators of dropout masks, of which there are none here."""

    def fork(self, *args: Any) -> contextlib.AbstractContextManager[None]:
        """Do nothing for a while."""
        return contextlib.nullcontext()

    def get_states(self) -> dict[str, Any]:
        """Return no generator's state, for recompute to put back."""
        return {}

    def set_states(self, states: dict[str, Any]) -> None:
        """Put nothing back."""


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


@contextlib.contextmanager
def building_on_cpu() -> Iterator[None]:
    """Put the stand-in into every module of Megatron-Core that was imported, for good; `Tensor.cuda` for a while."""
    from megatron.core.tensor_parallel import random

    stand_in = _CpuTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    random._CUDA_RNG_STATE_TRACKER = _Tracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor):
        yield


def name_types(parameters: Iterable[nn.Parameter]) -> None:
    """Let parameters answer `type()` as they would on a device, by which the optimizer tells formats apart."""
    for parameter in parameters:
        name = f"torch.cuda.{_TYPES[parameter.dtype]}"
        parameter.type = lambda name=name: name  # type: ignore[method-assign,assignment,misc]
