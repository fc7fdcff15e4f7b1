"""Materialise a split model: every element depends on (seed, parameter name, global index) alone.

So a rank fills its own rectangle, allocates nothing more, and every layout starts from the same model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from dist_llm.ops.counter_rng import key_of, normal
from dist_llm.parallel.shards import LocalShard

_CHUNK = 1 << 20
"""Elements drawn at a time: the counters are int64 and the draws float64, far larger than the weights."""


def allocate(module: nn.Module, stored: torch.device, device: torch.device) -> None:
    """Give a meta module storage, in place: parameters without values yet where they are stored, buffers of zeros."""
    module.to_empty(device=stored)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.zeros_like(buffer, device=device))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _global_indices(shard: LocalShard, rows: range) -> Int64[Tensor, "*index"]:
    """Return the row-major logical index of every element of the given local rows."""
    strides = _strides(shard.shape)
    device = shard.tensor.device
    index = (torch.arange(rows.start, rows.stop, device=device) + shard.offsets[0]) * strides[0]
    for dim in range(1, len(shard.shape)):
        along = (torch.arange(shard.extent[dim], device=device) + shard.offsets[dim]) * strides[dim]
        index = index[..., None] + along
    return index


@torch.no_grad()
def fill_normal(shard: LocalShard, seed: int, std: float) -> None:
    """Fill the shard with normals of standard deviation `std`; padding becomes zero."""
    shard.tensor.zero_()
    inside = shard.inside(shard.tensor)
    if inside.numel() == 0:
        return
    key = key_of("init", seed, shard.name)
    step = max(1, _CHUNK * inside.shape[0] // inside.numel())
    for start in range(0, inside.shape[0], step):
        rows = range(start, min(start + step, inside.shape[0]))
        inside[rows.start : rows.stop] = (normal(_global_indices(shard, rows), key) * std).to(inside.dtype)


def fill_constant(shards: Iterable[LocalShard], value: float) -> None:
    """Fill shards with one value (norm weights, biases)."""
    for shard in shards:
        shard.tensor.fill_(value)
