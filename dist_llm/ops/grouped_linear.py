"""Many linear maps at once: rows come sorted by group, and each group has its own matrix: y_r = W_g(r) x_r.

On CUDA in bf16 it is torch's grouped GEMM; elsewhere one product a group. A group may have no rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dist_llm.ops.row_counts import row_counts


def grouped_linear(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "groups outputs inputs"], counts: Int64[Tensor, " groups"]
) -> Float[Tensor, "rows outputs"]:
    """Return the rows of x, each times the matrix of its group; `counts` are the rows of each group."""
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        ends = counts.to(x.device).cumsum(0).to(torch.int32)
        out: Tensor = torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)
        return out
    parts = torch.split(x, row_counts(counts, x.shape[0]))
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight.unbind(0), strict=True)])
