"""A stand-in for `torch` where a library takes a CUDA device for granted and there is none.

    torch.cuda.current_device()   the CPU         device="cuda"   the CPU
    CUDA generators               the CPU's own   streams         none, all work is done when it is asked for

Only modules that are given it see it: everyone else's torch, and every tensor, are left as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "rand", "tensor", "zeros", "zeros_like")


class CpuTorch(ModuleType):
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
            Event=_Stream,
            stream=lambda stream: contextlib.nullcontext(),
            synchronize=lambda *args: None,
            get_rng_state=generator_state,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def generator_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the state of the CPU's generator."""
    return torch.get_rng_state()


def set_generator(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Set the state of the CPU's generator."""
    torch.set_rng_state(state)


class _Stream:
    """A queue that is always empty, and its events: on a CPU work is done when it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.wait_stream = self.wait_event = self.synchronize = lambda *args: None
        self.record_event = lambda *args: self


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made


def staying_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `Tensor.cuda` gives the tensor itself."""
    return mock.patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)


def without_compiler() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which what a library decorates with `torch.compile` stays as it is.

    Functions that are small enough for that cost minutes of a C++ compiler's time on a CPU, in every rank.
    """
    return mock.patch.object(torch, "compile", lambda function=None, **options: function or (lambda inner: inner))
