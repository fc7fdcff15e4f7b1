"""The peak that MFU is reckoned by."""

from __future__ import annotations

from dist_llm.config.run import RunConfig
from dist_llm.runtime.cores import usable_cores


def peak_flops(config: RunConfig, device_type: str, ranks: int, nodes: int) -> float | None:
    """Return the dense peak of all ranks' devices together in the compute format, in FLOP/s; None where not known.

    It is known for the kind of device that the cluster is of. On CUDA a rank has a device; on CPU the cores of a node
    are its devices, whatever the number of ranks.
    """
    cluster = config.cluster
    if cluster.device != device_type:
        return None
    devices = ranks if device_type == "cuda" else (cluster.devices_per_node or usable_cores()) * nodes
    each: float = getattr(cluster.peak_tflops, config.precision.name) * 1e12
    return each * devices
