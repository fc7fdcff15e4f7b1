"""Time collectives by kind and message size, beside what this machine copies in memory and what the plan expects.

    bandwidth = bytes that leave a rank on a ring / seconds       a message of s: the kind's payload, its larger buffer

In a round every kind and size has its turn, after a barrier; the slowest rank's time counts, and the median of rounds.
The copy is of memory to memory on all ranks at once: what a collective inside of a machine cannot exceed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dist_llm.config.run import RunConfig
from dist_llm.planner.cost.collectives import (
    all_reduce_seconds,
    gather_seconds,
    group_of,
    send_seconds,
)
from dist_llm.planner.cost.hardware import Fabric, fabric_of
from dist_llm.runtime.device import device_name, resolve_device, synchronize
from dist_llm.runtime.pool import WorkerPool
from dist_llm.runtime.process import prepare_rank
from dist_llm.runtime.reduce_scatter import reduce_scatter

LEAVING: Mapping[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
    "send": lambda ranks: 1.0,
}
"""Kinds that a layout issues, and the part of the payload that leaves a rank (runtime/ledger.py)."""
SIZES = tuple(4**exponent << 10 for exponent in range(1, 8))
"""Payloads in bytes: 4 KiB to 16 MiB."""
COPIED = 64 << 20
"""Bytes that a copy reads: more than caches hold."""
LEAST_SECONDS = 2e-3
"""A message that takes less is sent so often that all together take about that."""
Message = tuple[str, int]
"""A kind of collective and its payload in bytes."""
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shared_size(size: int, ranks: int) -> int:
    """Return the nearest payload in bytes, not above `size` if that can be, of which each rank has as many numbers."""
    return 4 * ranks * max(1, size // (4 * ranks))


def _call(kind: str, size: int, device: torch.device) -> Callable[[], object]:
    """Return what issues one collective of a payload of `size` bytes over the world."""
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert group is not None
    whole, part = torch.zeros(size // 4, device=device), torch.zeros(size // 4 // ranks, device=device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if kind == "all_gather":
        return lambda: _all_gather(whole, part)
    if kind == "reduce_scatter":
        return lambda: reduce_scatter(part, whole, group)
    if kind == "all_to_all":
        other = torch.empty_like(whole)
        return lambda: dist.all_to_all_single(other, whole)
    came, ahead, behind = torch.empty_like(whole), (rank + 1) % ranks, (rank - 1) % ranks

    def pass_on() -> None:
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, whole, ahead), dist.P2POp(dist.irecv, came, behind)]
        ):
            work.wait()

    return pass_on


def _seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    dist.barrier()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / times


def _agreed(seconds: float, device: torch.device) -> float:
    """Return the slowest rank's time, alike on all ranks. Issues one all-reduce."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def run_rounds(setting: str, messages: Sequence[Message], rounds: int) -> Iterator[object]:
    """Yield on this rank the device's name, then of each round the seconds of a copy and of each message.

    A message's first time, not counted, says how often it is sent in a round. Issues the collectives, barriers, and an
    all-reduce of a number for each.
    """
    device = resolve_device(setting, dist.get_rank())
    source: Tensor = torch.zeros(COPIED // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[Message, Callable[[], object]] = {("copy", COPIED): partial(target.copy_, source)}
    calls |= {message: _call(*message, device) for message in messages}
    often: dict[Message, int] = {}
    for message, call in calls.items():
        call()
        least = _agreed(_seconds(call, 1, device), device)
        often[message] = max(1, min(100, math.ceil(LEAST_SECONDS / least)))
    yield device_name(device)
    for _ in range(rounds):
        yield {message: _agreed(_seconds(call, often[message], device), device) for message, call in calls.items()}


def bench_collectives(
    config: RunConfig,
    ranks: int,
    *,
    kinds: Sequence[str] = tuple(LEAVING),
    sizes: Sequence[int] = SIZES,
    rounds: int = 5,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, object]:
    """Time collectives over `ranks` ranks of this machine; return the figures as JSON-able facts.

    sizes: payloads in bytes, made such that ranks can share them alike. Raises ConfigError where devices are missing.
    """
    shared = dict.fromkeys(shared_size(size, ranks) for size in sizes)
    messages = [(kind, size) for kind in kinds for size in shared]
    prepare = partial(prepare_rank, config.device, ranks, config.launcher.threads)
    taken: list[dict[Message, float]] = []
    with WorkerPool(ranks, timeout_seconds=config.launcher.timeout_seconds, prepare=prepare) as pool:
        stream = pool.stream(run_rounds, config.device, messages, rounds, world=ranks)
        processor = next(stream)[0]
        for replies in stream:
            taken.append(replies[0])
            report(f"round {len(taken)} of {rounds}: {sum(taken[-1].values()):.2f} s for one of each")
    seconds = {message: statistics.median(one[message] for one in taken) for message in taken[0]}
    copy = COPIED / seconds.pop(("copy", COPIED))
    fabric = fabric_of(config.cluster, ranks)
    link = fit_link(fabric, ranks, seconds)
    return {
        "ok": True,
        "processor": processor,
        "torch": torch.__version__,
        "backend": "gloo" if config.device == "cpu" or not torch.accelerator.is_available() else "nccl",
        "ranks": ranks,
        "rounds": rounds,
        "copy_gb_per_second": copy / 1e9,
        "cluster": config.cluster.name,
        "link_gb_per_second": link.link_bytes / 1e9,
        "link_microseconds": link.link_seconds * 1e6,
        "rows": [_row(message, each, ranks, copy, fabric) for message, each in seconds.items()],
    }


def _row(message: Message, seconds: float, ranks: int, copy: float, fabric: Fabric) -> dict[str, object]:
    kind, size = message
    rate = LEAVING[kind](ranks) * size / seconds
    foretold = foretold_seconds(fabric, ranks, kind, size)
    return {
        "kind": kind,
        "bytes": size,
        "seconds": seconds,
        "gb_per_second": rate / 1e9,
        "of_copy": rate / copy,
        "foretold_seconds": foretold,
        "foretold_error": foretold / seconds - 1,
    }


def foretold_seconds(fabric: Fabric, ranks: int, kind: str, size: int) -> float:
    """Return what the cost model says that a collective takes inside of one machine."""
    if kind == "send":
        return send_seconds(fabric, crosses_nodes=False, payload=size)
    model = all_reduce_seconds if kind == "all_reduce" else gather_seconds
    return model(fabric, group_of(fabric, ranks, 1), size)


def fit_link(fabric: Fabric, ranks: int, seconds: Mapping[Message, float]) -> Fabric:
    """Return the fabric with the rate and latency of its link with which the cost model is nearest to all times."""
    from scipy.optimize import least_squares

    def moved(logs: Sequence[float]) -> Fabric:
        return replace(fabric, link_bytes=math.exp(logs[0]), link_seconds=math.exp(logs[1]), in_switch=False)

    def gaps(logs: Sequence[float]) -> list[float]:
        there = moved(logs)
        return [math.log(foretold_seconds(there, ranks, *message) / each) for message, each in seconds.items()]

    start = [math.log(fabric.link_bytes), math.log(max(fabric.link_seconds, 1e-7))]
    found = least_squares(gaps, start, loss="soft_l1")
    return moved([float(log) for log in found.x])
