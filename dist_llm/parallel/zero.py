"""ZeRO (Rajbhandari et al. 2020) by stage, over the folded (dp, cp) axis; FSDP2 does the sharding.

    stage   parameters            gradients              collectives a step, for each FSDP unit, M microbatches
    0       whole                 whole                  all-reduce of flat buckets, once (replicas.py)
    1       sharded between steps whole until the last   1 all-gather, 1 reduce-scatter
    2       sharded between steps sharded                1 all-gather, M reduce-scatter
    3       sharded always        sharded                2M all-gather, M reduce-scatter

Replicated shards (HSDP) add one all-reduce a unit. A unit is the embedding, a block or several, or the head (with the
embedding when tied in one stage). FSDP2 also serves with nothing to shard below fp32: it holds the fp32 masters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from dist_llm.config.parallel import ParallelConfig
from dist_llm.runtime.mesh import Axis, Mesh
from dist_llm.runtime.reduce_scatter import reduce_scatter


def needs_fsdp(mesh: Mesh, compute: torch.dtype, master: torch.dtype, offload: str) -> bool:
    """Return whether there is anything to shard, to cast or to fetch from the host."""
    return mesh.shard.size > 1 or compute != master or offload == "parameters"


def storage_device(mesh: Mesh, offload: str) -> torch.device:
    """Return where parameters are stored."""
    return torch.device("cpu") if offload == "parameters" else mesh.device


def apply_zero(
    model: nn.Module,
    units: Sequence[Sequence[nn.Module]],
    experts: Iterable[nn.Module],
    mesh: Mesh,
    parallel: ParallelConfig,
    policy: MixedPrecisionPolicy,
) -> None:
    """Shard experts, then each unit, then what is left as the root, in place. Gradients are summed, never averaged.

    Issues nothing now. What is gathered ahead is said to FSDP2 for each unit: on its own it goes by the order of past
    forwards, and with more than one in flight (pipelines) gathers units of another microbatch in vain.
    """
    inside = list(experts)
    offload = _offload_policy(mesh, parallel.offload)
    options: dict[str, Any] = {"reshard_after_forward": parallel.zero == 3, "mp_policy": policy}
    for module in inside:
        fully_shard(module, mesh=mesh.expert.zero_mesh, offload_policy=offload, **options)
    for unit in units:
        fully_shard(unit[0] if len(unit) == 1 else list(unit), mesh=mesh.zero_mesh, offload_policy=offload, **options)
    rest = {*model.parameters()} - {weight for unit in units for module in unit for weight in module.parameters()}
    fully_shard(model, mesh=mesh.zero_mesh, offload_policy=offload, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_reduce_scatter(_ReduceScatter())  # type: ignore[arg-type]
    _set_prefetch([model] if rest else [], units, inside, parallel.prefetch)


class _ReduceScatter:
    """FSDP2's reduce-scatter: the one of all of this package."""

    @staticmethod
    def allocate(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer that it is given to, or from."""
        return torch.empty(*size, dtype=dtype, device=device)

    @staticmethod
    def __call__(
        output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Sum the input over the group and keep a part; FSDP2 waits for it, by streams or here."""
        reduce_scatter(output_tensor, input_tensor, group, op)


def _set_prefetch(
    root: list[nn.Module], units: Sequence[Sequence[nn.Module]], experts: list[nn.Module], ahead: int
) -> None:
    """Let every unit gather the next `ahead` ones, forward and back; experts come after the blocks that hold them.

    Experts gather none ahead in a forward, which may be a recompute: what comes next in it is then done already.
    root: the model, where it is a unit itself, the first to be gathered both ways (the tied embedding and head).
    """
    held = [[inner for module in unit for inner in module.modules() if inner in experts] for unit in units]
    forward: list[Any] = [*root]
    backward: list[Any] = [*root]
    for unit, inner in zip(units, held, strict=True):
        forward += [unit[0], *inner]
    for unit, inner in zip(reversed(units), reversed(held), strict=True):
        backward += [unit[0], *reversed(inner)]
    for place, module in enumerate(forward):
        if module in experts:
            continue
        module.set_modules_to_forward_prefetch(forward[place + 1 : place + 1 + ahead])
    for place, module in enumerate(backward):
        # A unit that names itself gathers nothing more; one that names none is left to FSDP2's own choice.
        module.set_modules_to_backward_prefetch(backward[place + 1 : place + 1 + ahead] or [module])


def _offload_policy(mesh: Mesh, offload: str) -> OffloadPolicy:
    if offload != "parameters":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu")


def set_backward_traffic(model: nn.Module, stage: int, last: bool, complete: bool = True) -> None:
    """Say before a backward whether it reduces gradients and frees parameters, by stage and microbatch.

    complete: False before the first half of a backward, which reduces nothing.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(complete and (last or stage >= 2))
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or stage == 3)


def release(model: nn.Module) -> None:
    """Free the gathered parameters of a model that ran forward only."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_in_buckets(grads: Iterable[Tensor], axis: Axis, bucket_bytes: int, device: torch.device) -> None:
    """Sum gradients over the axis in place, in flat buckets. Issues one all-reduce a bucket over `axis`.

    Buckets hold whole tensors of one dtype, at most `bucket_bytes` unless one tensor alone is larger. They are sent
    from `device`, wherever the gradients are.
    """
    if axis.size == 1:
        return
    for bucket in _buckets(grads, bucket_bytes):
        flat = torch.cat([grad.reshape(-1) for grad in bucket]).to(device)
        dist.all_reduce(flat, group=axis.group)
        for grad, part in zip(bucket, torch.split(flat, [grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Iterable[Tensor], bucket_bytes: int) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for grad in grads:
        if bucket and (held + grad.nbytes > bucket_bytes or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(grad)
        held += grad.nbytes
    if bucket:
        yield bucket
