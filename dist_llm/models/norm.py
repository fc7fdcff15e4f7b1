"""The two norms, by config name."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dist_llm.config.model import ModelConfig
from dist_llm.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dim."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Normalise the last dim of x."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """y = (x - mean) / std * weight (+ bias) over the last dim (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Normalise the last dim of x."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def build_norm(config: ModelConfig, width: int) -> nn.Module:
    """Return the configured norm over `width` features."""
    if config.norm == "rmsnorm":
        return RMSNorm(width, config.norm_eps)
    return LayerNorm(width, config.norm_eps, config.bias)
