"""The backward of a stage in two halves, for schedules that fill the bubble with the second (Qi et al. 2023).

    I  autograd as ever, but every linear leaves its weight gradient in a queue: all collectives of tp and cp, once
    W  the queue: products of local tensors alone, then what ZeRO does after a backward

Embeddings and norms have their gradients in the first half. FSDP2's own hook runs in the first half too, told to
reduce nothing; `finish_backward` runs it again when the unit's gradients are complete.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dist_llm.ops.linear import WeightGradients, linear
from dist_llm.parallel.async_tensor import AsyncColumnLinear
from dist_llm.parallel.tensor import RowParallelLinear


class SplitLinear(nn.Linear):
    """A linear that leaves its weight gradient in a queue."""

    later: WeightGradients

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Map x."""
        return linear(x, self.weight, self.bias, self.later)


def apply_split_backward(model: nn.Module) -> WeightGradients:
    """Make every linear of a stage leave its weight gradient in one queue, in place; return the queue."""
    later = WeightGradients()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SplitLinear
        if isinstance(module, SplitLinear | RowParallelLinear | AsyncColumnLinear):
            module.later = later
    return later


def finish_backward(model: nn.Module) -> None:
    """Let FSDP2 take the gradients that came after its hook: accumulate, or reduce and free, as it was told.

    Issues what ZeRO issues for a backward, over the shard and replicate axes; nothing without FSDP.
    """
    if not isinstance(model, FSDPModule):
        return
    root = model._get_fsdp_state()  # torch has no public name for this; its pipeline stage goes the same way
    for state in root._state_ctx.all_states:
        for group in _param_groups(state):
            if group.reduce_grads:
                _complete(group)
            group.post_backward()
    root._root_post_backward_final_callback()


def _complete(group: Any) -> None:
    """Give zeros to what an earlier second half has reduced already, and all of it one format, before a reduction."""
    for sharded in group.fsdp_params:
        parameter = sharded.unsharded_param
        if sharded.unsharded_accumulated_grad is None and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        sharded.accumulate_unsharded_grad_if_needed()
        sharded.to_accumulated_grad_if_needed()


def _param_groups(state: Any) -> list[Any]:
    """Return the parameter groups of a unit; before torch 2.12 it has one at most."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
