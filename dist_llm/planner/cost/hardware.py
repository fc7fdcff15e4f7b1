"""A hardware file as the rates that the cost model multiplies with, in bytes, FLOPs and seconds of one rank.

On CUDA a rank is a device. On a CPU it is its share of a node's cores, and the host's work comes on top of the device's
instead of beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.accounting.memory import FORMAT_BYTES
from dist_llm.config.cluster import ClusterConfig


@dataclass(frozen=True)
class Device:
    """What one rank computes with: FLOP/s of products and of what no matrix unit takes, bytes/s, seconds an operation.

    width: bytes of an element. host_ahead: whether operations are issued while earlier ones run.
    """

    matmul_flops: float
    plain_flops: float
    units: int
    memory_bytes: float
    kernel_seconds: float
    dispatch_seconds: float
    width: int
    host_ahead: bool

    def moved(self, amount: float, kernels: int = 1) -> float:
        """Return the seconds of `kernels` operations that read and write `amount` bytes in all."""
        return amount / self.memory_bytes + kernels * self.kernel_seconds


@dataclass(frozen=True)
class Fabric:
    """What ranks talk over: bytes/s and seconds of a message inside a node, and of a whole node to the others."""

    devices_per_node: int
    link_bytes: float
    link_seconds: float
    in_switch: bool
    network_bytes: float
    network_seconds: float


@lru_cache(maxsize=256)
def device_of(cluster: ClusterConfig, compute: str, cores: float = 1.0) -> Device:
    """Return what a rank with `cores` devices of a cluster computes with, in the compute format."""
    peak = getattr(cluster.peak_tflops, compute) * 1e12 * cores
    plain = cluster.peak_tflops.fp32 * 1e12 * cores
    return Device(
        matmul_flops=peak * cluster.matmul_efficiency,
        plain_flops=min(peak, plain) * cluster.matmul_efficiency,
        units=cluster.matmul_units,
        memory_bytes=cluster.memory_gb_per_second * 1e9 * cores,
        kernel_seconds=cluster.kernel_microseconds * 1e-6,
        dispatch_seconds=cluster.dispatch_microseconds * 1e-6,
        width=FORMAT_BYTES[compute],
        host_ahead=cluster.device == "cuda",
    )


@lru_cache(maxsize=256)
def fabric_of(cluster: ClusterConfig, ranks_per_node: int) -> Fabric:
    """Return what the ranks of a cluster talk over."""
    return Fabric(
        devices_per_node=ranks_per_node,
        link_bytes=cluster.link_gb_per_second * 1e9,
        link_seconds=cluster.link_microseconds * 1e-6,
        in_switch=cluster.reduces_in_switch,
        network_bytes=cluster.network_gbit_per_second * 1e9 / 8,
        network_seconds=cluster.network_microseconds * 1e-6,
    )
