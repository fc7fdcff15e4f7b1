"""Deliberate faults in what ranks tell each other, each as a patch of the running code, and where they must show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.engine import native, recipe, routing
from dist_llm.engine.routing import Routing
from dist_llm.models.plan import plan_rate
from dist_llm.ops import grouped_linear, linear
from dist_llm.ops.context_share import ContextShare
from dist_llm.ops.linear import accumulate
from dist_llm.parallel import collectives, context, replicas, ring, zero
from dist_llm.parallel.expert import ExpertDispatch
from dist_llm.parallel.replicas import ReplicaSum
from dist_llm.parallel.ring import RingDocuments, Turn
from dist_llm.runtime import mesh
from dist_llm.runtime.mesh import ContextAxes
from tests.parallel.tiny import MOE, Curve, curve


@dataclass(frozen=True)
class Fault:
    """A fault on a layout of `ranks` ranks of a model."""

    name: str
    ranks: int
    parallel: dict[str, object]
    model: dict[str, object] = field(default_factory=dict)
    documents: bool = False


MIXED: dict[str, object] = {"context": 4, "context_method": "mixed", "context_heads": 2}
FAULTS = (
    Fault("tp all-reduce dropped", 2, {"tensor": 2, "zero": 0}),
    Fault("gradient all-reduce dropped", 2, {"zero": 0}),
    Fault("gradient all-reduce dropped", 2, {"tensor": 2, "sequence": True}),
    Fault("gradient all-reduce dropped", 2, {"pipeline": 2}),
    Fault("gradient scaled by ranks", 2, {"zero": 0}),
    Fault("bucket sent before the last backward", 2, {"zero": 0}),
    Fault("bucket sent before the last backward", 4, {"pipeline": 2, "zero": 0}),
    Fault("ZeRO averages gradients", 2, {"zero": 1}),
    Fault("norm counts replicas", 2, {"tensor": 2}),
    Fault("tied copies drift apart", 2, {"pipeline": 2, "schedule": "zbv"}),
    Fault("second half of a backward run twice", 2, {"pipeline": 2, "schedule": "zero_bubble"}),
    Fault("second half of experts run twice", 2, {"pipeline": 2, "schedule": "zero_bubble"}, MOE),
    Fault("ring merges without weights", 2, {"context": 2}),
    Fault("chunks of the sequence swapped", 2, {"context": 2}),
    Fault("ulysses mixes up positions", 2, {"context": 2, "context_method": "ulysses"}),
    Fault("ulysses repeats the wrong key heads", 4, {"context": 4, "context_method": "ulysses"}),
    Fault("ring turned among those who exchange heads", 4, MIXED),
    Fault("heads come back in another order", 4, MIXED),
    Fault("documents of another ring rank", 4, {"context": 4}, documents=True),
    Fault("rows come back to other tokens", 2, {"expert": 2}, MOE),
    Fault("expert gradients not summed", 4, {"expert": 2, "zero": 0}, MOE),
    Fault("balance loss sees a part of the sequence", 2, {"context": 2}, MOE),
    Fault("router losses counted by every tp rank", 2, {"tensor": 2}, MOE),
    Fault("bias moved by one rank's counts", 2, {"zero": 0}, MOE),
    Fault("learning rate by a shard's fan-in", 2, {"tensor": 2}, {"mup": {"base_width": 8}}),
)


def _dropped(grads: Any, axis: Any, size: int, device: torch.device) -> None:
    list(grads)


def _twice(parameter: Tensor, gradient: Tensor) -> None:
    accumulate(parameter, 2 * gradient)


def _natural(attention: Any, part: int, device: torch.device) -> Tensor:
    return torch.arange(attention._axis.size * part)


def _swapped_axes(axes: Callable[..., ContextAxes]) -> Callable[..., ContextAxes]:
    def call(*args: Any) -> ContextAxes:
        right = axes(*args)
        return ContextAxes(right.whole, right.ring, right.heads)

    return call


def _other_way(returned: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(self: context.UlyssesAttention, out: Tensor) -> Tensor:
        heads = returned(self, out)
        return heads.unflatten(1, (self._axis.size, -1)).flip(1).flatten(1, 2)

    return call


def _in_turn(self: context.UlyssesAttention, x: Tensor) -> Tensor:
    return x.repeat(1, math.lcm(x.shape[1], self._axis.size) // x.shape[1], 1, 1)


def _of_another(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(self: RingDocuments, here: int, turn: Turn) -> Tensor:
        source = (turn.source + 1) % len(self.shares) if turn.source != here else here
        queries, keys = self.shares[here][:, turn.queries], self.shares[source][:, turn.keys]
        return mask(self, here, turn) if source == here else (queries[:, :, None] == keys[:, None])[:, None]

    return call


class Home:
    """A journey that was never made."""

    def wait(self) -> None:
        """There is nothing to wait for."""


def _averaged(begin_sum: Callable[..., Any], flat: Tensor, axis: Any) -> Any:
    return begin_sum(flat.div_(axis.size), axis)


def _but_experts(begin_sum: Callable[..., Any], flat: Tensor, axis: Any) -> Any:
    return Home() if axis.name == "expert_zero" else begin_sum(flat, axis)


def _but_counts(all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, group: Any, async_op: bool = False) -> Any:
        return None if x.dtype == torch.int64 else all_reduce(x, group=group, async_op=async_op)

    return call


def _too_early(expect: Callable[..., None]) -> Callable[..., None]:
    def call(self: ReplicaSum, last: bool) -> None:
        expect(self, True)

    return call


def _every_square(shards: Any, device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for shard in shards:
        total += shard.gradient().double().square().sum()
    return total


def _unweighted(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    return (out + more) / 2, torch.logaddexp(lse, more_lse)


def _in_order(share: ContextShare, num_tokens: int, device: torch.device) -> Tensor:
    return torch.arange(share.rank * num_tokens, (share.rank + 1) * num_tokens)


def _backwards(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: ExpertDispatch, x: Tensor, counts: Tensor) -> Any:
        there, counts_there, back = dispatch(self, x, counts)
        return there, counts_there, lambda out: back(out.flip(0))

    return call


def _rate_of_shard(config: ModelConfig, name: str) -> float:
    return plan_rate(config, name) * (2 if name.endswith(("wo.weight", "down.weight")) else 1)


def _share_of_all(begin: Callable[..., None]) -> Callable[..., None]:
    def call(self: Routing, unit: float) -> None:
        begin(self, unit)
        for tally in self._tallies:
            tally.share = 1.0

    return call


def _own_counts(routing: Routing) -> None:
    routing.counts = {router.layer: router.tally.counts[router.layer] for _, router in routing._named}


PATCHES: dict[str, Callable[[], list[Any]]] = {
    "tp all-reduce dropped": lambda: [patch.object(collectives, "all_reduce_sum", lambda x, axis: x.clone())],
    "gradient all-reduce dropped": lambda: [
        patch.object(native, "reduce_in_buckets", _dropped),
        patch.object(replicas, "begin_sum", lambda flat, axis: Home()),
    ],
    "gradient scaled by ranks": lambda: [patch.object(replicas, "begin_sum", partial(_averaged, replicas.begin_sum))],
    "bucket sent before the last backward": lambda: [patch.object(ReplicaSum, "expect", _too_early(ReplicaSum.expect))],
    "ZeRO averages gradients": lambda: [
        patch.object(zero.FSDPModule, "set_gradient_divide_factor", lambda module, factor: None),
        patch.object(zero.FSDPModule, "set_force_sum_reduction_for_comms", lambda module, enable: None),
    ],
    "norm counts replicas": lambda: [patch.object(native, "primary_square_sum", _every_square)],
    "tied copies drift apart": lambda: [patch.object(native.NativeEngine, "finish_gradients", lambda engine: None)],
    "second half of a backward run twice": lambda: [patch.object(linear, "accumulate", _twice)],
    "second half of experts run twice": lambda: [patch.object(grouped_linear, "accumulate", _twice)],
    "ring merges without weights": lambda: [patch.object(ring, "merge", _unweighted)],
    "chunks of the sequence swapped": lambda: [patch.object(ContextShare, "positions", _in_order)],
    "ulysses mixes up positions": lambda: [
        patch.object(
            context.UlyssesAttention, "_order", lambda self, part, device: torch.arange(self._axis.size * part)
        )
    ],
    "ulysses repeats the wrong key heads": lambda: [patch.object(context.UlyssesAttention, "_repeated", _in_turn)],
    "ring turned among those who exchange heads": lambda: [
        patch.object(mesh, "_context_axes", _swapped_axes(mesh._context_axes))
    ],
    "heads come back in another order": lambda: [
        patch.object(context.UlyssesAttention, "_returned", _other_way(context.UlyssesAttention._returned))
    ],
    "documents of another ring rank": lambda: [patch.object(RingDocuments, "mask", _of_another(RingDocuments.mask))],
    "rows come back to other tokens": lambda: [
        patch.object(ExpertDispatch, "__call__", _backwards(ExpertDispatch.__call__))
    ],
    "expert gradients not summed": lambda: [
        patch.object(replicas, "begin_sum", partial(_but_experts, replicas.begin_sum))
    ],
    "balance loss sees a part of the sequence": lambda: [patch.object(routing, "all_reduce_sum", lambda x, axis: x)],
    "router losses counted by every tp rank": lambda: [patch.object(Routing, "begin", _share_of_all(Routing.begin))],
    "learning rate by a shard's fan-in": lambda: [patch.object(recipe, "plan_rate", _rate_of_shard)],
    "bias moved by one rank's counts": lambda: [patch.object(Routing, "gather", _own_counts)],
}
"""What each fault replaces."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Break the running code inside."""
    with ExitStack() as stack:
        for replaced in PATCHES[name]():
            stack.enter_context(replaced)
        yield


def broken_curve(config: RunConfig, name: str) -> Curve:
    """Train with a fault on every rank."""
    with planted(name):
        return curve(config)
