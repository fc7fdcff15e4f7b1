"""Add up the gradients of replicas (ZeRO 0) while the backward still runs: flat buckets, each sent when it is full.

    last backward   g_n  g_n-1 | bucket 0 travels | g_n-2 ... | bucket 1 travels | ... g_0    then wait for all of them

A bucket holds whole gradients, in the reverse of the order in which the stage has its parameters: about that in
which they come. Buckets are the same on every rank and go in one fixed order, so replicas need not agree on who is
ready (Li et al. 2020). A gradient becomes a part of its bucket: nothing is copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_llm.parallel.shards import LocalShard
from dist_llm.runtime.mesh import Axis, Mesh


@dataclass
class _Bucket:
    """Parameters whose gradients travel together over an axis, how many of them are still to come, and the journey."""

    axis: Axis
    parameters: list[nn.Parameter]
    missing: int = 0
    journey: dist.Work | None = None


def begin_sum(flat: Tensor, axis: Axis) -> dist.Work:
    """Begin to sum a bucket in place. Issues one all-reduce over `axis`."""
    work: dist.Work = dist.all_reduce(flat, group=axis.group, async_op=True)
    return work


def _fill_buckets(parameters: Sequence[nn.Parameter], axis: Axis, bucket_bytes: int) -> list[_Bucket]:
    """Return buckets of at most `bucket_bytes` unless one tensor alone is larger."""
    buckets: list[_Bucket] = []
    held = bucket_bytes
    for parameter in parameters if axis.size > 1 else ():
        if not buckets or held + parameter.nbytes > bucket_bytes:
            buckets.append(_Bucket(axis, []))
            held = 0
        buckets[-1].parameters.append(parameter)
        held += parameter.nbytes
    return buckets


class ReplicaSum:
    """The buckets of a stage. Nothing travels before `expect` or `send` says that a backward is the step's last."""

    def __init__(self, shards: Sequence[LocalShard], mesh: Mesh, bucket_bytes: int) -> None:
        backwards = list(reversed(shards))
        place = {shard.parameter: index for index, shard in enumerate(backwards)}
        dense = _fill_buckets([s.parameter for s in backwards if not s.expert], mesh.zero, bucket_bytes)
        experts = _fill_buckets([s.parameter for s in backwards if s.expert], mesh.expert.zero, bucket_bytes)
        self._buckets = sorted([*dense, *experts], key=lambda bucket: place[bucket.parameters[-1]])
        self._home = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._sent, self._last = 0, False
        for parameter in self._home:
            parameter.register_post_accumulate_grad_hook(self._came)  # type: ignore[no-untyped-call]

    def expect(self, last: bool) -> None:
        """Say before a whole backward whether it is the last of the step."""
        self._last = last
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _came(self, parameter: Tensor) -> None:
        """Count a gradient that is complete; send the buckets whose turn it is."""
        if not self._last:
            return
        self._home[parameter].missing -= 1  # type: ignore[index]
        while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._sent]
        self._sent += 1
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for parameter, part in zip(bucket.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        bucket.journey = begin_sum(flat, bucket.axis)

    def send(self) -> None:
        """Send what has not been sent. Issues one all-reduce a bucket over zero, expert_zero for experts."""
        while self._sent < len(self._buckets):
            self._send_next()

    def finish(self) -> None:
        """Send the rest and let the device wait until all sums are there."""
        self.send()
        for bucket in self._buckets:
            if bucket.journey is not None:
                bucket.journey.wait()
                bucket.journey = None
        self._sent, self._last = 0, False
