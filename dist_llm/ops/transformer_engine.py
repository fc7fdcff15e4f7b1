"""The norms of NVIDIA's Transformer Engine (2.0 or newer), where it is installed, as kernels of torch.ops.dist_llm.

Its functions take rows of two dims, one format for rows and weights, and add no residual: that is a sum before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dist_llm.config.extensions import find_extension


def transformer_engine_problem() -> str | None:
    """Say why Transformer Engine's norms are not to be had here, None where they are. Imports nothing."""
    found = find_extension("transformer-engine")
    if found.usable:
        if (found.version or "2").partition(".")[0] == "1":
            return f"{found.place} is Transformer Engine {found.version}, older than 2.0: {found.install}"
        return None
    return found.problem or f"Transformer Engine is not installed: {found.install}"


def _functions() -> Any:
    """Return its extension module, which can be imported once its package was: that loads what it links to."""
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch

    return transformer_engine_torch


def _format(functions: Any, dtype: torch.dtype) -> Any:
    names = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16", torch.float16: "kFloat16"}
    return getattr(functions.DType, names[dtype])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _plus(grad: Tensor, shape: torch.Size, more: Tensor | None) -> Tensor:
    grad = grad.view(shape)
    return grad if more is None else grad + more


def _rms_norm(x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], eps: float) -> tuple[Tensor, Tensor]:
    functions = _functions()
    kind = _format(functions, x.dtype)
    out, _, rstd = functions.rmsnorm_fwd(_rows(x), weight.to(x.dtype), eps, None, None, kind, 0, False)
    return out.view(x.shape), rstd.view(x.shape[:-1])


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    out, rstd = _rms_norm(total, weight, eps)
    return out, total, rstd


def _rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    narrow = weight.to(x.dtype)
    grad_x, grad_weight = _functions().rmsnorm_bwd(_rows(grad), _rows(x), rstd.flatten(), narrow, 0, False)
    return _plus(grad_x, x.shape, grad_total), grad_weight.to(weight.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    functions = _functions()
    narrow = weight.to(x.dtype)
    shift = torch.zeros_like(narrow) if bias is None else bias.to(x.dtype)  # it has no kernel for a scale alone
    kind = _format(functions, x.dtype)
    out, mean, rstd = functions.layernorm_fwd(_rows(x), narrow, shift, eps, None, None, kind, 0, False)
    return out.view(x.shape), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x + residual
    out, mean, rstd = _layer_norm(total, weight, bias, eps)
    return out, total, mean, rstd


def _layer_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(grad), _rows(x), mean.flatten(), rstd.flatten()
    grad_x, grad_weight, grad_bias = _functions().layernorm_bwd(*rows, weight.to(x.dtype), 0, False)
    return _plus(grad_x, x.shape, grad_total), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


KERNELS: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "rms_norm": {
            "rms_norm": _rms_norm,
            "add_rms_norm": _add_rms_norm,
            "rms_norm_backward": _rms_norm_backward,
        },
        "layer_norm": {
            "layer_norm": _layer_norm,
            "add_layer_norm": _add_layer_norm,
            "layer_norm_backward": _layer_norm_backward,
        },
    }
)
"""By op of the registry, then by schema."""
