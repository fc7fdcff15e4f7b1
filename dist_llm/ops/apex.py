"""The fused norms of NVIDIA's apex, where it is installed; `apex` on PyPI is another project, and is named as that."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from dist_llm.config.extensions import find_extension

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def apex_problem() -> str | None:
    """Say why apex's norms are not to be had here, None where they are. Imports nothing."""
    found = find_extension("apex")
    if not found.usable:
        return found.problem or f"NVIDIA's apex is not installed: {found.install}"
    if find_spec("fused_layer_norm_cuda") is None:
        return f"{found.place} was built without fused_layer_norm_cuda: {found.install}"
    return None


def rms_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*rows width"]:
    """Return x normed and scaled, in x's format; weight is rounded to that, which apex's kernel is for."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    out: Tensor = fused_rms_norm_affine(x, weight.to(x.dtype), [*weight.shape], eps)
    return out


def layer_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], bias: Float[Tensor, " width"] | None, eps: float
) -> Float[Tensor, "*rows width"]:
    """Return x normed, scaled and shifted, in x's format; weight and bias are rounded to that."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    shift = torch.zeros_like(weight) if bias is None else bias  # it has no kernel for a scale alone
    out: Tensor = fused_layer_norm_affine(x, weight.to(x.dtype), shift.to(x.dtype), [*weight.shape], eps)
    return out
