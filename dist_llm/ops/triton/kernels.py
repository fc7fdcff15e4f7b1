"""The kernels of the ops that have a choice of backends, by their names in torch.ops.dist_llm and of their schemas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from dist_llm.ops.cross_entropy import Vocabulary
from dist_llm.ops.triton import bias_gelu, cross_entropy, gated, layer_norm, rms_norm, rope
from dist_llm.types import IGNORE_INDEX


def _gelu(x: Tensor) -> Tensor:
    return bias_gelu.bias_gelu(x, None)


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return bias_gelu.bias_gelu_backward(grad, x, None)[0]


def _statistics(logits: Tensor, targets: Tensor, start: int, valid: int, ignored: int) -> tuple[Tensor, Tensor]:
    _check_ignored(ignored)
    return cross_entropy.cross_entropy_statistics(logits, targets, Vocabulary(start, valid, 0))


def _gradient(logits: Tensor, targets: Tensor, grad: Tensor, top: Tensor, raised: Tensor, *numbers: Any) -> None:
    start, valid, size, ignored, *terms = numbers
    _check_ignored(ignored)
    part = Vocabulary(start, valid, size)
    cross_entropy.cross_entropy_gradient_(logits, targets, grad, (top, raised), part, *terms)


def _check_ignored(ignored: int) -> None:
    if ignored != IGNORE_INDEX:
        raise ValueError(f"a target that is not counted is {IGNORE_INDEX} in triton's kernels, not {ignored}")


KERNELS: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "rms_norm": {
            "rms_norm": rms_norm.rms_norm,
            "add_rms_norm": rms_norm.add_rms_norm,
            "rms_norm_backward": rms_norm.rms_norm_backward,
        },
        "layer_norm": {
            "layer_norm": layer_norm.layer_norm,
            "add_layer_norm": layer_norm.add_layer_norm,
            "layer_norm_backward": layer_norm.layer_norm_backward,
        },
        "gelu": {
            "gelu": _gelu,
            "bias_gelu": bias_gelu.bias_gelu,
            "gelu_backward": _gelu_backward,
            "bias_gelu_backward": bias_gelu.bias_gelu_backward,
        },
        "swiglu": {"swiglu": gated.swiglu, "swiglu_backward": gated.swiglu_backward},
        "rope": {"rope": rope.rope},
        "cross_entropy": {"cross_entropy_statistics": _statistics, "cross_entropy_gradient_": _gradient},
    }
)
"""By op of the registry, then by schema."""
