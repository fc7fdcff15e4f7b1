"""Seconds of what data ranks exchange in a step and do not hide, and of the optimizer's update.

    zero 0        one all-reduce of gradients           zero 1   reduce-scatter of gradients, all-gather of parameters
    zero 2        a reduce-scatter each microbatch      zero 3   and two all-gathers each microbatch

Gradients go in the master format (practice.py says when not), parameters in the compute format. Native engine and FSDP:
what computation covers is hidden but for the first and last unit, and slows what covers it by a quarter of itself, for
collectives run on the same units. Megatron of 2021-23 below zero 3: nothing is hidden. Nor is it on a CPU, whose cores
carry the traffic that they would hide; on top come the copies to and from its buffers: of a gather the shard on its
way in and all of it on its way out, of a reduction all on its way in and the sum of what came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from dist_llm.accounting.params import embedding_parameters, head_parameters, layer_parameters
from dist_llm.config.model import ModelConfig
from dist_llm.planner.cost.collectives import all_reduce_seconds, gather_seconds, group_of
from dist_llm.planner.cost.hardware import Device, Fabric

SLOWED = 0.25
"""Seconds that computation loses to each second of a collective beside it."""
UPDATE_BYTES = 36
"""Bytes that AdamW moves an element: norm, clip, gradient, master, two moments read and three written, one copy out."""
_UPDATE_OPERATIONS = 20


@dataclass(frozen=True)
class Held:
    """Elements that a rank of a stage holds before ZeRO: of experts, of all else, and ZeRO's units."""

    dense: float
    expert: float
    units: int


Numels = dict[str, tuple[float, float]]
"""Elements, without and with experts, of one rank's `first` or `last` block, `embed` and `head`."""


@lru_cache(maxsize=2**10)
def part_numels(model: ModelConfig, tensor: int, expert: int) -> Numels:
    """Return the elements of each part of a model on one of `tensor` tp and `expert` ep ranks."""
    parts = {
        "first": layer_parameters(model, 0),
        "last": layer_parameters(model, model.num_layers - 1),
        "embed": embedding_parameters(model),
        "head": head_parameters(model),
    }
    numels = {}
    for part, specs in parts.items():
        sizes = [(spec.expert, float(math.prod(spec.local_shape(tensor, expert)))) for spec in specs]
        plain = sum(size for routed, size in sizes if not routed)
        numels[part] = (plain, sum(size for routed, size in sizes if routed))
    return numels


@dataclass(frozen=True)
class Exchange:
    """How a stage's parameters are spread and moved: ranks of data x context and their stride, copies, ZeRO stage.

    width, gradient_width: bytes of an element. scatters: whether a rank gets the sums of its shard alone.
    """

    ranks: int
    stride: int
    replicate: int
    zero: int
    expert: int
    hides: bool
    width: int
    gradient_width: int
    scatters: bool


@dataclass(frozen=True)
class Cover:
    """Computation that may hide traffic: forward and backward of one microbatch, and how many there are."""

    forward: float
    backward: float
    microbatches: int


def exchange_seconds(device: Device, fabric: Fabric, exchange: Exchange, held: Held, cover: Cover) -> float:
    """Return the seconds that gradients and parameters cost a step beyond what computation hides."""
    gather = reduce = once = copied_out = copied_in = 0.0
    for numel, shared in ((held.dense, 1), (held.expert, exchange.expert)):
        if not numel or exchange.ranks // shared == 1:
            continue
        copies = exchange.replicate if exchange.zero else exchange.ranks // shared
        shards = max(1, exchange.ranks // shared // copies)
        near = group_of(fabric, shards, exchange.stride * shared)
        far = group_of(fabric, copies, exchange.stride * shared * shards)
        gather += gather_seconds(fabric, near, numel * exchange.width)
        sums = gather_seconds if exchange.scatters else all_reduce_seconds
        reduce += sums(fabric, near, numel * exchange.gradient_width)
        once += all_reduce_seconds(fabric, far, numel / shards * exchange.gradient_width)
        if shards > 1:
            copied_out += numel * (2 + 2 / shards)
            copied_in += numel * (3 + 1 / shards)
    if not device.host_ahead:
        gather += device.moved(copied_out * exchange.width)
        reduce += device.moved(copied_in * exchange.gradient_width)
        return _in_turn(exchange, cover.microbatches, gather, reduce) + once
    count, last = cover.microbatches, 1 / max(1, held.units)
    ends = last * (gather + reduce + once)
    if exchange.zero == 3:
        each = _left(gather, cover.forward) + _left(gather + reduce, cover.backward)
        return count * each + _left(once, max(0.0, cover.backward - gather - reduce)) + ends
    often = count if exchange.zero == 2 else 1
    if not exchange.hides:
        return gather + reduce * often + once
    beside = often * _left(reduce, cover.backward) + _left(once, max(0.0, cover.backward - reduce))
    return beside + _left(gather, cover.forward) + ends


def _in_turn(exchange: Exchange, count: int, gather: float, reduce: float) -> float:
    """Return the seconds of all gathers and reductions of a step, one after the other."""
    gathers = 2 * count if exchange.zero == 3 else 1
    return gathers * gather + (count if exchange.zero >= 2 else 1) * reduce


def _left(traffic: float, computation: float) -> float:
    """Return what traffic costs beside so much computation: what sticks out, and what it slows."""
    return max(0.0, traffic - computation) + SLOWED * min(traffic, computation)


def update_seconds(device: Device, exchange: Exchange, held: Held, offloaded: bool) -> float:
    """Return the seconds of the optimizer's update of a rank's shard."""
    shards = exchange.ranks // exchange.replicate if exchange.zero else 1
    mine = held.dense / shards + held.expert / max(1, shards // exchange.expert if exchange.zero else 1)
    slow = _HOST if offloaded else 1.0
    return slow * device.moved(mine * UPDATE_BYTES, _UPDATE_OPERATIONS) + _UPDATE_OPERATIONS * device.dispatch_seconds


_HOST = 12.0
"""How much longer the update takes in host memory, its way over PCIe included (ZeRO-Offload, Ren et al. 2021)."""
