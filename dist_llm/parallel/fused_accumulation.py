"""Weight gradients of linears go straight into FSDP2's fp32 sums, for as long as a backward reduces nothing.

    without   dW in the compute format, made anew each microbatch;  sum <- sum + fp32(dW)
    with      sum <- sum + dy^T x, in one product                    (ops/fused_accumulation.py)

FSDP2 keeps a sum for each parameter between microbatches under ZeRO 0 and 1 and reduces it in the last backward. Later
stages reduce each microbatch and keep none. A step of one microbatch whose backward is whole needs no sum either: its
gradients go the usual way, as those of embeddings, norms, biases and experts always do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dist_llm.parallel.whole_gradients import begin_sum, param_groups, sum_so_far


class GradientTotals:
    """Finds the fp32 sum of a weight of a model that FSDP2 holds."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._records: dict[Tensor, tuple[Any, Any]] = {}

    def __call__(self, weight: Tensor) -> Tensor | None:
        """Return the sum of a gathered weight's gradients, begun with zeros; None where its backward begins none."""
        if weight not in self._records:
            self._find()
        group, record = self._records[weight]
        if not group.reduce_grads:
            return begin_sum(record, self._dtype)
        total = sum_so_far(record)
        # With no sum before it, a backward that reduces may have begun a gradient of the compute format here.
        return total if total is not None and total.dtype == self._dtype else None

    def _find(self) -> None:
        """Note the gathered weights, which FSDP2 makes in its first forward and keeps."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                for group in param_groups(module._get_fsdp_state()):
                    gathered = [record for record in group.fsdp_params if hasattr(record, "_unsharded_param")]
                    self._records.update({record._unsharded_param: (group, record) for record in gathered})
