"""dW <- dW + dy^T x with dW in fp32 and dy, x in bf16 or fp16: one product that adds where it writes.

On CUDA apex's kernel where it is installed, as Megatron-LM does (gradient_accumulation_fusion), else cuBLAS with an
fp32 output; elsewhere dy and x are widened, never the product. Nothing of the size of dW is made in the narrow format,
and no sum is rounded to it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_APEX = "fused_weight_gradient_mlp_cuda"
"""The extension module that NVIDIA apex builds; it is no package of its own on PyPI."""


@cache
def _apex_kernel() -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    if importlib.util.find_spec(_APEX) is None:
        return None
    kernel: Callable[[Tensor, Tensor, Tensor], Any] = importlib.import_module(_APEX).wgrad_gemm_accum_fp32
    return kernel


def add_weight_gradient(
    total: Float[Tensor, "outputs inputs"], grad: Float[Tensor, "rows outputs"], x: Float[Tensor, "rows inputs"]
) -> None:
    """Add grad^T x to `total`, in place; `total` is fp32."""
    if grad.device.type != "cuda":
        torch.addmm(total, grad.t().to(total.dtype), x.to(total.dtype), out=total)
        return
    kernel = _apex_kernel()
    if kernel is not None:
        kernel(x.contiguous(), grad.contiguous(), total)
    else:
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
