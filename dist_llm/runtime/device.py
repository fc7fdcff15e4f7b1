"""The device that a rank computes on, and what it costs: peak memory and waiting for queued work."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from dist_llm.errors import ConfigError, Violation

_GIB = 2**30


def resolve_device(setting: Literal["auto", "cpu", "cuda"] | str, local_rank: int) -> torch.device:
    """Return the device of the rank `local_rank` of a node: `auto` takes CUDA where torch sees a device.

    Raises ConfigError when CUDA is asked for and absent, or the node has fewer CUDA devices than ranks.
    """
    if setting not in ("auto", "cpu", "cuda"):
        raise ConfigError([Violation("device", setting, "must be one of the known devices", ("auto", "cpu", "cuda"))])
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError([Violation("device", setting, "needs a CUDA device that torch can see", ("cpu",))])
    available = torch.cuda.device_count()
    if local_rank >= available:
        rule = f"must not exceed the CUDA devices of this node ({available}): one device a rank"
        raise ConfigError([Violation("launcher.nproc", f">{local_rank}", rule, (available,))])
    return torch.device("cuda", local_rank)


def share_memory(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether the ranks of a group can map each other's memory (torch's symmetric memory), and prepare it.

    All ranks answer alike. Issues one all-reduce of a number on CUDA, nothing elsewhere.
    """
    if device.type != "cuda":
        return False
    import torch.distributed._symmetric_memory as symmetric

    try:
        symmetric.enable_symm_mem_for_group(group.group_name)
        shared = symmetric.rendezvous(symmetric.empty(1, device=device), group.group_name) is not None
    except RuntimeError:
        shared = False
    everywhere = torch.tensor(int(shared), device=device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=group)
    return bool(everywhere.item())


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this rank has held, in GiB: allocated by torch on CUDA, resident (RSS) on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    if sys.platform == "linux":
        # Not ru_maxrss: across fork and exec it keeps the peak of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024 / _GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in KiB.
    return peak / _GIB if sys.platform == "darwin" else peak * 1024 / _GIB


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued on it; nothing to wait for on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return what the hardware calls itself: the CUDA device's name, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
