"""Megatron-Core on a CPU: its modules get a torch without CUDA (runtime/cpu_torch.py) and what else they ask for.

On CUDA nothing here is used.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dist_llm.runtime.cpu_torch import CpuTorch, generator_state, set_generator

_TYPES = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor", torch.float16: "HalfTensor"}


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


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return a tensor as Megatron-Core has it once it came from a device: counts of rows as numpy's."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def prepare_modules() -> None:
    """Put the stand-in into every module of Megatron-Core that was imported, for good."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    stand_in = CpuTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    random._CUDA_RNG_STATE_TRACKER = _Tracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state, random._set_cuda_rng_state = generator_state, set_generator
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 asks for it where Transformer Engine is missing
        moe_utils.te_general_gemm = None


def name_types(parameters: Iterable[nn.Parameter]) -> None:
    """Let parameters answer `type()` as they would on a device, by which the optimizer tells formats apart."""
    for parameter in parameters:
        name = f"torch.cuda.{_TYPES[parameter.dtype]}"
        parameter.type = lambda name=name: name  # type: ignore[method-assign,assignment]
