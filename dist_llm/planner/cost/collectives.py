"""Seconds of collectives by message: latency, and bytes over the slowest thing that they cross.

    all-reduce               a(n) + 2 (n - 1)/n S / b     in the switch: (n + 1)/n S / b, b at 0.84 (NVLS)
    all-gather, scatter      a(n) + (n - 1)/n S / b       all-to-all: the same
    b                        the link inside a node; between nodes the least of it and the group's part of the network
    a(n)                     link latency x (1 + 0.16 (n - 1)) + 2 x network latency x (nodes - 1), at most 12 nodes

Rings as NCCL builds them. Constants: vTrain's table of all-reduces on 2 to 8 A100, to 5 %; ml-engineering for NVLS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.planner.cost.hardware import Fabric

RING_EFFICIENCY = 0.9
"""Part of a network's line rate that rings over all of a node's adapters reach (nccl-tests, 4 nodes: 0.92, 0.95)."""
SEND_EFFICIENCY = 0.65
"""The same of single messages between neighbours, which no other flow fills up."""
_SWITCH = 0.84
_GROWTH = 0.16
_MOST_HOPS = 12


@dataclass(frozen=True)
class Group:
    """Ranks of one axis: how many, and how many of them share a node."""

    ranks: int
    local: int

    @property
    def nodes(self) -> int:
        """Nodes that the group spans."""
        return -(-self.ranks // self.local)


@lru_cache(maxsize=2**12)
def group_of(fabric: Fabric, ranks: int, stride: int) -> Group:
    """Return the group of every `stride`-th rank, `ranks` of them; neighbours share nodes."""
    return Group(ranks, max(1, min(ranks, fabric.devices_per_node // stride)))


def _bandwidth(fabric: Fabric, group: Group) -> float:
    """Return the bus bandwidth of a group in bytes/s: all groups of a node use its network at once."""
    if group.nodes == 1:
        return fabric.link_bytes
    return min(fabric.link_bytes, RING_EFFICIENCY * fabric.network_bytes * group.local / fabric.devices_per_node)


def latency_seconds(fabric: Fabric, group: Group) -> float:
    """Return the seconds of a collective that carries nothing."""
    if group.ranks == 1:
        return 0.0
    inside = fabric.link_seconds * (1 + _GROWTH * (group.local - 1)) if group.local > 1 else 0.0
    return inside + 2 * fabric.network_seconds * min(group.nodes - 1, _MOST_HOPS)


def all_reduce_seconds(fabric: Fabric, group: Group, payload: float) -> float:
    """Return the seconds of an all-reduce of `payload` bytes."""
    if group.ranks == 1:
        return 0.0
    ring = 2 * (group.ranks - 1) / group.ranks * payload / _bandwidth(fabric, group)
    if fabric.in_switch and group.nodes == 1:
        ring = min(ring, (group.ranks + 1) / group.ranks * payload / (fabric.link_bytes * _SWITCH))
    return latency_seconds(fabric, group) + ring


def gather_seconds(fabric: Fabric, group: Group, payload: float) -> float:
    """Return the seconds of an all-gather, reduce-scatter or all-to-all of `payload` bytes, the larger buffer."""
    if group.ranks == 1:
        return 0.0
    share = (group.ranks - 1) / group.ranks * payload
    return latency_seconds(fabric, group) + share / _bandwidth(fabric, group)


def send_seconds(fabric: Fabric, crosses_nodes: bool, payload: float) -> float:
    """Return the seconds of a message of `payload` bytes to a neighbour while each device of the node sends one."""
    if crosses_nodes:
        share = SEND_EFFICIENCY * fabric.network_bytes / fabric.devices_per_node
        return fabric.network_seconds + payload / share
    return fabric.link_seconds + payload / fabric.link_bytes
