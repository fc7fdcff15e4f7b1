"""The backward of a stage in two halves, for schedules that fill the bubble with the second (Qi et al. 2023).

    I  autograd as ever, but every linear leaves its weight gradient in a queue: all collectives of tp and cp, once
    W  the queue: products of local tensors alone, then what ZeRO does after a backward

Embeddings and norms have their gradients in the first half. FSDP2's own hook runs in the first half too, told to
reduce nothing; `finish_backward` runs it again when the unit's gradients are complete.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from dist_llm.ops.linear import WeightGradients
from dist_llm.parallel.whole_gradients import complete, param_groups


def apply_weight_gradients(model: nn.Module, later: WeightGradients) -> None:
    """Make every linear of a stage leave its weight gradient to `later`, in place: whatever has that attribute."""
    for module in model.modules():
        if hasattr(module, "later"):
            module.later = later  # type: ignore[assignment]


def finish_backward(model: nn.Module) -> None:
    """Let FSDP2 take the gradients that came after its hook: accumulate, or reduce and free, as it was told.

    Issues what ZeRO issues for a backward, over the shard and replicate axes; nothing without FSDP.
    """
    if not isinstance(model, FSDPModule):
        return
    root = model._get_fsdp_state()  # torch has no public name for this; its pipeline stage goes the same way
    for state in dict.fromkeys(root._state_ctx.all_states):  # torch 2.11 names one for each block of its unit
        for group in param_groups(state):
            if group.reduce_grads:
                for record in group.fsdp_params:
                    complete(record)
            group.post_backward()
    context: Any = root._state_ctx
    if getattr(context, "manual_backward_finalization_active", False) is None:
        context.manual_backward_finalization_active = False  # torch 2.15 asks for it, and forgets it with each backward
    root._root_post_backward_final_callback()
