"""What a device holds beside tensors: one small set of figures a kind of device, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.config.run import RunConfig

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class DeviceMemory:
    """Memory that is not the model's.

    reserve_bytes: context of the device and the communication library's buffers. fragmentation: share of what is
    allocated that the allocator keeps beside it. workspace_bytes: what the matrix library holds through torch.
    """

    reserve_bytes: int
    fragmentation: float
    workspace_bytes: int

    def in_use(self, tensor_bytes: int) -> int:
        """Return the bytes of a device in use where the model's tensors are so many at the most."""
        return int((tensor_bytes + self.workspace_bytes) * (1 + self.fragmentation)) + self.reserve_bytes


FRAGMENTATION = 0.08

_HOPPER_TFLOPS = 500.0
"""Devices with a higher peak in bf16 are Hopper's and later, for which cuBLAS wants 32 MiB instead of 4 or 8."""


def device_memory(config: RunConfig) -> DeviceMemory:
    """Return the figures of a config's cluster; a CPU has the process alone.

    Workspace: cuBLAS and cuBLASLt through torch, Transformer Engine's own; two of 32 MiB under deterministic algorithms
    (`CUBLAS_WORKSPACE_CONFIG=:4096:8`). Reserve and fragmentation: as seen by nvidia-smi over a process of Megatron's
    size (tensor, pipeline, data and embedding groups of NCCL).
    """
    if config.cluster.device == "cpu":
        return DeviceMemory(int(config.cluster.reserve_gib * _GIB), 0.0, 0)
    late = config.cluster.peak_tflops.bf16 > _HOPPER_TFLOPS
    workspace = (112 if late else 80) if config.run.deterministic else (104 if late else 32)
    return DeviceMemory(int(config.cluster.reserve_gib * _GIB), FRAGMENTATION, workspace * _MIB)
