"""Where FSDP2 keeps the sum of a gathered weight's gradients between backwards that reduce nothing.

    before torch 2.15   in its own record of the weight, in the format of the reduction; `grad` has the last backward's
    from then on        in the `grad` of the gathered weight, in the format of the reduction (`grad_dtype`)

torch has no public names for these. `record` is FSDP2's of one parameter, `group` that of the parameters of a unit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

IN_GRAD = not hasattr(FSDPParam, "to_accumulated_grad_if_needed")
"""Whether the sum is the `grad` of the gathered weight."""


def param_groups(state: Any) -> list[Any]:
    """Return the parameter groups of a unit; before torch 2.12 it has one at most."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def begin_sum(record: Any, dtype: torch.dtype) -> Tensor:
    """Return the sum of a gathered weight's gradients; zeros of its shape in `dtype` where there is none yet."""
    total = sum_so_far(record)
    if total is not None:
        return total
    weight = record.unsharded_param
    zeros = torch.zeros_like(weight, dtype=dtype)
    if IN_GRAD:
        weight.grad_dtype, weight.grad = dtype, zeros
    else:
        record.unsharded_accumulated_grad = zeros
    return zeros


def sum_so_far(record: Any) -> Tensor | None:
    """Return the sum of a gathered weight's gradients, if there is one."""
    total: Tensor | None = record.unsharded_param.grad if IN_GRAD else record.unsharded_accumulated_grad
    return total


def complete(record: Any) -> None:
    """Give zeros to a weight that an earlier reduction left none; bring the rest to one format, as 2.15 has done."""
    weight = record.unsharded_param
    if sum_so_far(record) is None and weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype if IN_GRAD else None)
    if not IN_GRAD:
        record.accumulate_unsharded_grad_if_needed()
        record.to_accumulated_grad_if_needed()
