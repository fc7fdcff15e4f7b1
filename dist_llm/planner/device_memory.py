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


_NONE = DeviceMemory(0, 0.0, 0)


def device_memory(config: RunConfig) -> DeviceMemory:
    """Return the figures of a config's cluster.

    cuBLAS has two workspaces of 32 MiB under deterministic algorithms (`CUBLAS_WORKSPACE_CONFIG=:4096:8`), else of
    8.1 MiB (torch, notes on CUDA); a little more is the libraries' own. A CPU has none of all this.
    """
    if config.cluster.device == "cpu":
        return _NONE
    return DeviceMemory(2 * _GIB, 0.04, (80 if config.run.deterministic else 24) * _MIB)
