"""Seconds of one pipeline stage for one microbatch: its blocks, and the embedding and head at the ends.

    a pass takes the longer of the device's time and the host's time to issue it (on a CPU, their sum)

Near each other, neither hides all of the other: their 4-norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from dist_llm.accounting.params import padded_vocab
from dist_llm.planner.cost.collectives import all_reduce_seconds, gather_seconds, group_of
from dist_llm.planner.cost.hardware import Device, Fabric
from dist_llm.planner.cost.layer import layer_passes
from dist_llm.planner.cost.matmul import matmul_seconds
from dist_llm.planner.cost.seconds import Passes, Seconds
from dist_llm.planner.cost.shape import Shape

_NORM = 4.0
_LOSS_BYTES = 20
"""Bytes that the loss moves for each logit and pass: cast to fp32, its maximum, exponentials and their sum."""


@dataclass(frozen=True)
class Blocks:
    """What a stage holds: blocks without and with experts, how many of them are recomputed, and the ends."""

    dense: int
    expert: int
    recomputed: int
    first: bool
    last: bool


@dataclass(frozen=True)
class StageSeconds:
    """One microbatch of one stage: by reason, and what forward and backward take with the host."""

    passes: Passes
    forward: float
    backward: float

    @property
    def whole(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@lru_cache(maxsize=2**14)
def stage_seconds(device: Device, fabric: Fabric, shape: Shape, blocks: Blocks) -> StageSeconds:
    """Return the seconds of one microbatch of a stage."""
    kept = _kept(shape)
    whole = Passes()
    left = blocks.recomputed
    for count, has_experts in ((blocks.dense, False), (blocks.expert, True)):
        if not count:
            continue
        again = min(left, count)
        left -= again
        whole += layer_passes(device, fabric, shape, has_experts) * again
        if count > again:
            whole += layer_passes(device, fabric, kept, has_experts) * (count - again)
    if blocks.first:
        whole += _embedding(device, fabric, shape)
    if blocks.last:
        whole += _head(device, fabric, shape)
    return StageSeconds(
        whole,
        _together(device, whole.forward.device, whole.forward.host),
        _together(device, whole.backward.device + whole.again.device, whole.backward.host + whole.again.host),
    )


@lru_cache(maxsize=2**12)
def _kept(shape: Shape) -> Shape:
    """Return the shape of a block that is not recomputed."""
    return replace(shape, full=False, again=())


def _together(device: Device, work: float, host: float) -> float:
    """Return the seconds of device work that the host issues meanwhile, or first."""
    if not device.host_ahead:
        return work + host
    longer = max(work, host)
    return longer * ((work / longer) ** _NORM + (host / longer) ** _NORM) ** (1 / _NORM) if longer else 0.0


def _embedding(device: Device, fabric: Fabric, shape: Shape) -> Passes:
    """Return the look-up of tokens, and the sum over tensor ranks that each hold a part of the vocabulary."""
    rows = padded_vocab(shape.vocab, shape.tensor) // shape.tensor
    sent, back = _end(fabric, shape)
    forward = device.moved(4 * shape.hidden_bytes, 3)
    backward = device.moved(3 * shape.hidden_bytes + rows * shape.hidden * (shape.width + 2 * shape.master_width), 4)
    issue = 5 * device.dispatch_seconds
    return Passes(
        Seconds(memory_bound=forward, tensor_comm=sent, host=issue),
        Seconds(memory_bound=backward, tensor_comm=back, host=issue),
    )


def _end(fabric: Fabric, shape: Shape) -> tuple[float, float]:
    """Return the sum of hidden states over tensor ranks at an end of the model, and what goes the other way for it.

    An all-reduce and nothing, or under sequence parallelism a reduce-scatter and an all-gather.
    """
    group = group_of(fabric, shape.tensor, 1)
    if not shape.sequence:
        return all_reduce_seconds(fabric, group, shape.hidden_bytes), 0.0
    half = gather_seconds(fabric, group, shape.hidden_bytes)
    return half, half


def _head(device: Device, fabric: Fabric, shape: Shape) -> Passes:
    """Return the last norm, the projection on the vocabulary, and the loss over tensor ranks' parts of it."""
    columns = padded_vocab(shape.vocab, shape.tensor) // shape.tensor
    tokens, hidden = shape.tokens, shape.hidden
    group = group_of(fabric, shape.tensor, 1)
    sums = 2 * all_reduce_seconds(fabric, group, 4 * tokens)
    back, sent = _end(fabric, shape)
    loss = device.moved(tokens * columns * _LOSS_BYTES, 8)
    forward = matmul_seconds(device, tokens, hidden, columns)
    backward = matmul_seconds(device, tokens, columns, hidden) + matmul_seconds(device, hidden, tokens, columns)
    issue = 12 * device.dispatch_seconds
    return Passes(
        Seconds(forward, memory_bound=loss, tensor_comm=sums + sent, host=issue),
        Seconds(backward, memory_bound=loss, tensor_comm=back, host=issue),
    )
