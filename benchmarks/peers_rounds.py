"""What a rank of peers.py does: build all contestants of a case, then time a round of each in turn, as often as asked.

    ours: step x n | bare: step x n | plain: step x n | ...        round 1, then the same again

All are in the same processes, with the same threads and allocator. A round is of whole optimizer steps on batches that
were made before; each has done two that are not timed.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.peers_libraries import build_deepspeed, build_transformers
from benchmarks.peers_megatron import build_megatron
from benchmarks.peers_steps import (
    CannotRunError,
    Contestant,
    build_bare,
    build_gemm_floor,
    build_ours,
    build_plain,
)
from dist_llm.config.run import RunConfig
from dist_llm.runtime.mesh import Mesh, build_mesh
from dist_llm.runtime.seed import set_determinism
from dist_llm.train.bench_step import random_batch
from dist_llm.types import Batch

CONTESTANTS: dict[str, Callable[[RunConfig, Mesh], Contestant]] = {
    "ours": build_ours,
    "bare": build_bare,
    "plain": build_plain,
    "gemm_floor": build_gemm_floor,
    "deepspeed": build_deepspeed,
    "megatron": build_megatron,
    "transformers": build_transformers,
}
"""In the order in which they take turns."""


@dataclass(frozen=True)
class Start:
    """What a rank says when all stand: the first losses of those that do, by name, and why others are left out."""

    losses: dict[str, float]
    same_start: tuple[str, ...]
    left_out: dict[str, str]


def reason_of(error: Exception) -> str:
    """Return an error in a line: what a contestant said itself, or the kind, place and words of any other."""
    words = (str(error).splitlines() or [""])[0]
    if isinstance(error, CannotRunError):
        return words
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {last.name} ({Path(last.filename).name}:{last.lineno}): {words}"


def run_rounds(config: RunConfig, names: tuple[str, ...], rounds: int, steps: int) -> Iterator[object]:
    """Yield on this rank a Start, then for each round the seconds of a step by name. A barrier before each turn."""
    mesh = build_mesh(config.parallel, torch.device("cpu"), config.launcher.timeout_seconds)
    threads = torch.get_num_threads()
    ready: dict[str, Contestant] = {}
    losses: dict[str, float] = {}
    left_out: dict[str, str] = {}

    def batches(name: str, first: int, count: int) -> list[Batch]:
        return [random_batch(config, ready[name].share, step) for step in range(first, first + count)]

    for name in names:
        try:
            ready[name] = CONTESTANTS[name](config, mesh)
            set_determinism(config.run.seed, ready[name].deterministic)
            losses[name], _ = [ready[name].step(batch) for batch in batches(name, 0, 2)]
        except Exception as error:  # whatever a library raises, the others are still timed
            ready.pop(name, None)
            left_out[name] = reason_of(error)
        torch.set_num_threads(threads)
    yield Start(losses, tuple(name for name in ready if ready[name].same_start), left_out)
    for number in range(rounds):
        seconds: dict[str, float] = {}
        for name, contestant in ready.items():
            timed = batches(name, 2 + number * steps, steps)
            set_determinism(config.run.seed, contestant.deterministic)
            dist.barrier()
            began = time.perf_counter()
            for batch in timed:
                contestant.step(batch)
            seconds[name] = (time.perf_counter() - began) / steps
        yield seconds
