"""The two norms, by config name, alone or with the sum of a residual before them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dist_llm.config.model import ModelConfig
from dist_llm.ops.layer_norm import add_layer_norm, layer_norm
from dist_llm.ops.registry import Kernels
from dist_llm.ops.rms_norm import add_rms_norm, rms_norm

Rows = Float[Tensor, "*rows width"]


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dim."""

    kernels = Kernels()

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Rows, residual: Rows | None = None) -> Rows | tuple[Rows, Rows]:
        """Normalise the last dim of x; with a residual return the norm of x + residual, and that sum."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, self.kernels.rms_norm)
        return add_rms_norm(x, residual, self.weight, self.eps, self.kernels.rms_norm)


class LayerNorm(nn.Module):
    """y = (x - mean) / std * weight (+ bias) over the last dim (Ba et al. 2016)."""

    kernels = Kernels()

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps

    def forward(self, x: Rows, residual: Rows | None = None) -> Rows | tuple[Rows, Rows]:
        """Normalise the last dim of x; with a residual return the norm of x + residual, and that sum."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps, self.kernels.layer_norm)
        return add_layer_norm(x, residual, (self.weight, self.bias), self.eps, self.kernels.layer_norm)


Norm = RMSNorm | LayerNorm


def build_norm(config: ModelConfig, width: int) -> Norm:
    """Return the configured norm over `width` features."""
    if config.norm == "rmsnorm":
        return RMSNorm(width, config.norm_eps)
    return LayerNorm(width, config.norm_eps, config.bias)


def add_and_norm(norm: Norm, x: Rows, residual: Rows) -> tuple[Rows, Rows]:
    """Return the norm of x + residual and that sum, in one pass unless the norm's forward was replaced (recompute)."""
    if "forward" in vars(norm):
        total = x + residual
        return norm(total), total
    both: tuple[Rows, Rows] = norm(x, residual)
    return both
