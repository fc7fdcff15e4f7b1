"""The hardware: what MFU is reckoned by, and the figures of which the planner's step time, memory and cost are made.

One set a cluster, whatever the model. `..._reached` figures are what is measured, not what a data sheet promises; a
hardware file under conf/cluster says where each comes from, and `dist-llm plan calibrate` measures them anew.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_llm.config.base import Count, Section


class PeakTflops(Section):
    """Dense peak of one device by compute format, in TFLOP/s (no structured sparsity)."""

    fp32: float = Field(gt=0)
    """Peak in fp32, without TF32, in TFLOP/s."""
    bf16: float = Field(gt=0)
    """Peak in bf16, in TFLOP/s."""
    fp16: float = Field(gt=0)
    """Peak in fp16, in TFLOP/s."""
    fp64: float = Field(gt=0)
    """Peak in fp64, in TFLOP/s."""


class ClusterConfig(Section):
    """The hardware, by which MFU is reckoned and steps are foretold; for a CPU box a device is a core."""

    name: str
    """Name of the hardware, kept with the run."""
    device: Literal["cpu", "cuda"]
    """Kind of device; a run on another kind has no MFU."""
    devices_per_node: Count | None
    """Devices of a node; null: its usable cores. MFU counts these on CPU, and one device a rank on CUDA."""
    devices_per_host: Count | None = None
    """Devices that one operating system sees, where a node's links reach beyond it (a rack of GB200); null: all."""
    nodes: Count | None = None
    """Nodes that a plan may use; null: as many as the ranks take."""
    peak_tflops: PeakTflops
    """Dense peak of one device by compute format, in TFLOP/s; that of precision.name is the divisor of MFU."""
    memory_gib: float = Field(gt=0)
    """Memory of one device, in GiB; a plan fills 95 % of it at the most, a run is not limited by it."""
    reserve_gib: float = Field(3.0, ge=0)
    """Memory of a device that no tensor can use: context, kernels, communication buffers, in GiB."""
    matmul_efficiency: float = Field(0.78, gt=0, le=1)
    """Part of the peak that large, well-shaped matrix products reach when they run for long."""
    matmul_units: Count = 108
    """Units of a device that each compute one tile of a product at a time (streaming multiprocessors); 1: no tiles."""
    memory_gb_per_second: float = Field(1730.0, gt=0)
    """Memory traffic that element-wise operations reach on one device, reads and writes together, in GB/s."""
    kernel_microseconds: float = Field(4.0, ge=0)
    """Least time of an operation on the device, in microseconds."""
    dispatch_microseconds: float = Field(30.0, ge=0)
    """Time of the host to issue one operation, autograd and framework included, in microseconds; it runs ahead of a
    CUDA device, and comes on top on a CPU."""
    link_gb_per_second: float = Field(225.0, gt=0)
    """Bus bandwidth that a collective reaches inside a node (nccl-tests' busbw), one device, in GB/s."""
    link_microseconds: float = Field(34.0, ge=0)
    """Least time of a collective of two ranks of a node, in microseconds."""
    reduces_in_switch: bool = False
    """Whether switches add up all-reduces inside a node (NVLS); gathers and scatters are no faster for it."""
    network_gbit_per_second: float = Field(800.0, gt=0)
    """Network of one node, each way, in Gbit/s."""
    network_microseconds: float = Field(20.0, ge=0)
    """Least time of a message between nodes, in microseconds."""
    storage_gb_per_second: float = Field(2.0, ge=1e-6)
    """Rate at which one node writes checkpoints, in GB/s."""
    usd_per_device_hour: float = Field(2.0, ge=0, le=2**20)
    """Price of one device for an hour, its share of the node included, in US dollars."""
    watts_per_device: float = Field(700.0, gt=0)
    """Power of one device under load, its share of node and cooling included, in watts."""
    mtbf_device_hours: float = Field(50000.0, ge=1e-3)
    """Mean time between failures that end a job, times its devices, in hours."""
    practice: Literal["native", "megatron"] = "native"
    """Whose software is foretold. native: ours, with stages cut by cost. megatron: Megatron-LM as of 2021-23: equally
    many layers a stage, gradients sent after the backward, and under engine.transformer_engine=never scores in memory;
    with engine=deepspeed below ZeRO 3 Megatron-DeepSpeed: stages that wait for each other's messages, and gradients
    added up one by one."""
    step_error: float | None = Field(None, gt=0, lt=1)
    """Within what part of them nine of ten measured steps on it were foretold; null: none were compared."""
    source: str
    """Where these numbers come from."""
