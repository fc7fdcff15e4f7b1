"""Start and stop one rank: lifeline, threads, allocator, device, and the default process group.

    store of the group: alone -> HashStore | `dist-llm launch` -> FileStore in its private folder | else MASTER_ADDR (env://)

Numbers must not depend on who started the rank, so threads come from the config and the node's cores, never from
OMP_NUM_THREADS or from the launcher's core binding. On one node nothing but the loopback interface listens:
a FileStore opens no port, and gloo and NCCL are pinned to loopback (a TCPStore would listen on every interface).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import socket
import stat
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, Store  # torch.distributed does not export them

from dist_llm.errors import ConfigError, LayoutError, PeerLostError, StorageError, Violation
from dist_llm.runtime.cores import usable_cores
from dist_llm.runtime.device import resolve_device
from dist_llm.runtime.lifeline import die_with_launcher
from dist_llm.runtime.ranks import RankInfo

STORE_VARIABLE = "DIST_LLM_STORE"
"""Path of the FileStore that `dist-llm launch` made for the ranks of one node."""


def start_process(ranks: RankInfo, device: str, timeout_seconds: float, threads: int | None) -> torch.device:
    """Make this process rank `ranks.rank` of the job and return the device it computes on.

    device is `auto`, `cpu` or `cuda`; a collective that takes longer than timeout_seconds fails; threads are the
    intra-op CPU threads (None: the node's cores shared out over its ranks, at least 1).
    Issues the rendezvous of the default group over all ranks: gloo on CPU, NCCL beside gloo on CUDA.
    Raises ConfigError or LayoutError for what the user set, PeerLostError when the other ranks do not come.
    """
    if ranks.world_size > 1:
        die_with_launcher()
    chosen = prepare_rank(device, ranks.local_world_size, threads, ranks.local_rank)
    if ranks.one_node:
        pin_loopback()
    _join_group(ranks, backend_for(chosen), timedelta(seconds=timeout_seconds))
    atexit.register(stop_process)
    return chosen


def prepare_rank(device: str, local_world_size: int, threads: int | None, local_rank: int) -> torch.device:
    """Give this process the threads, allocator and device that a rank of a run has; return the device.

    threads None: the node's cores shared out over its `local_world_size` ranks. Issues no collective.
    Raises ConfigError for a device that is not there.
    """
    chosen = resolve_device(device, local_rank)
    _set_threads(threads if threads is not None else max(1, usable_cores() // local_world_size))
    if chosen.type == "cpu":
        _keep_freed_memory()
    else:
        torch.cuda.set_device(chosen)
    return chosen


def stop_process() -> None:
    """Leave the default process group, if this process is in one, and free every group. Issues no collective.

    A group's threads that outlive the interpreter abort the process (they let go of tensors, which needs the GIL), and
    its exit code is lost; tracebacks hold groups in cycles. So this also runs last, when no frame is left.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_placements()
    gc.collect()


def forget_placements() -> None:
    """Empty DTensor's caches: they are keyed by meshes, which hold the groups of every layout that ever ran here."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import _sharding_prop, debug

    # torch has no public name for either; where a version lacks one there is nothing to empty.
    clear = getattr(debug, "_clear_sharding_prop_cache", None)
    if clear is not None:
        clear()
    shapes = getattr(_sharding_prop.ShardingPropagator, "_propagate_tensor_meta_cached", None)
    clear = getattr(shapes, "cache_clear", None)
    if clear is not None:
        clear()


_PEER_LOSS_PHRASES = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection was closed",
    "broken pipe",
    "timed out waiting",
    "wait timeout",
    "socket timeout",
    "application timeout caused pair closure",
    "failed to connect",
    "remote process exited",
    "connection was likely closed",
    "gloo connectfullmesh failed",
)


def is_peer_loss(exc: BaseException) -> bool:
    """Say whether an error, or what caused it, means that another rank or the store went away: the job may be retried.

    Pure; reads the types of torch's errors, and the text of those that gloo raises as plain RuntimeError.
    """
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, PeerLostError | dist.DistNetworkError | dist.DistStoreError | ConnectionError):
            return True
        if isinstance(current, RuntimeError):
            text = str(current).lower()
            if any(phrase in text for phrase in _PEER_LOSS_PHRASES):
                return True
        current = current.__cause__ or current.__context__
    return False


def _set_threads(threads: int) -> None:
    """Fix the CPU threads of this process; inter-op threads can only be set once and before any parallel work."""
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError:
            # Work already ran in this process, as in a test. They serve torch.jit.fork alone: no number changes.
            return


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks: a fresh page costs microseconds, and each step asks for the same sizes.

    Takes 8-10 % off a CPU step for some resident memory; a C library without mallopt is left as it is.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(top_pad, 64 << 20)


def pin_loopback() -> None:
    """Make gloo and NCCL listen on loopback alone, unless the user named an interface."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", names[0])


def backend_for(device: torch.device) -> str:
    """Return the backend of the default group for a device."""
    if device.type == "cpu":
        return "gloo"
    if not dist.is_nccl_available():
        raise ConfigError([Violation("device", device.type, "needs a torch that was built with NCCL", ("cpu",))])
    return "cpu:gloo,cuda:nccl"


def _join_group(ranks: RankInfo, backend: str, timeout: timedelta) -> None:
    """Form the default group through the store that belongs to this launcher."""
    try:
        store = _private_store(ranks)
        if store is not None:
            store.set_timeout(timeout)
        dist.init_process_group(
            backend,
            init_method=None if store is not None else "env://",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
        )
    except (RuntimeError, ConnectionError) as error:
        if not is_peer_loss(error):
            raise
        seconds = timeout.total_seconds()
        message = f"rank {ranks.rank} of {ranks.world_size} met not all of its peers within {seconds:g} s: {error}"
        raise PeerLostError(message) from error


def _private_store(ranks: RankInfo) -> Store | None:
    """Return a store that opens no port, or None where the ranks meet at MASTER_ADDR:MASTER_PORT."""
    if ranks.world_size == 1:
        return HashStore()
    path = os.environ.get(STORE_VARIABLE)
    if path is None:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            rule = f"must say where {ranks.world_size} ranks meet; start them with `dist-llm launch` or torchrun"
            raise LayoutError([Violation(name, None, rule) for name in missing])
        return None
    folder = Path(path).parent
    try:
        facts = folder.stat()
    except OSError as error:
        raise StorageError(f"{STORE_VARIABLE}={path}: {error.strerror}; is its launcher still running?") from error
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise StorageError(
            f"{STORE_VARIABLE}={path}: its folder must be owned by this user and closed to others (0700)"
        )
    return FileStore(path, ranks.world_size)
