"""The share of time in which ranks of a pipeline idle, measured and as its schedule has it.

    python benchmarks/bubble.py --ranks 4 --microbatches 8 --milliseconds 200

Stages sleep instead of computing, equally long for a forward and for each half of a backward, so the machine's cores do
not matter; everything else (schedules, sends and receives, the queue of weight gradients) is what training runs. A rank
is busy while it is in a stage's forward or backward, by the clock, and idle else. Exits with 1 when a measured share is
not within a tenth of the schedule's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from dist_llm.accounting.schedules import Pipe, Work, stage_rank
from dist_llm.config.parallel import ParallelConfig
from dist_llm.ops.linear import WeightGradients
from dist_llm.parallel.pipeline import Microbatching, Scheduled, StageModule, StageTensors
from dist_llm.parallel.replicas import ReplicaSum
from dist_llm.planner.schedule_trace import trace_schedule
from dist_llm.runtime.mesh import build_mesh
from dist_llm.runtime.pool import WorkerPool
from dist_llm.types import Batch

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2, "dualpipev": 2}
"""What is measured, with the stages of each rank."""

WIDTH, LENGTH = 2, 4


class _Asleep(torch.autograd.Function):
    """Sleeps on its way forward and back, and leaves a sleep for the second half of a backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, later: WeightGradients | None) -> Tensor:
        ctx.seconds, ctx.later = seconds, later
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        if ctx.later is None:
            time.sleep(ctx.seconds)
        else:
            ctx.later.add(lambda: time.sleep(ctx.seconds))
        return grads[0], None, None


class _Stage(nn.Module):
    def __init__(self, seconds: float, later: WeightGradients | None, first: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seconds, self.later, self.first = seconds, later, first

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        """Pass hidden states on, later."""
        hidden = x[..., None].float().expand(*x.shape, WIDTH) if self.first else x
        out: Tensor = _Asleep.apply(hidden * self.scale, self.seconds, self.later)  # type: ignore[no-untyped-call]
        return out


@contextmanager
def _timed() -> Iterator[list[float]]:
    """Give a list to which every forward, backward and half of one adds its wall-clock seconds."""
    spent: list[float] = []

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - began)

        return around

    with ExitStack() as patches:
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            patches.enter_context(patch.object(PipelineStage, name, timed(getattr(PipelineStage, name))))
        yield spent


def measure(
    schedule: str, chunks: int, microbatches: int, seconds: float, runs: int
) -> list[tuple[float, float, float]]:
    """Return (began, ended, busy) of steps on this rank, the first left out, in seconds of the machine's clock."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parallel = ParallelConfig.model_validate(
        {"pipeline": ranks, "virtual_pipeline": chunks, "schedule": schedule, "zero": 0}
    )
    mesh = build_mesh(parallel, torch.device("cpu"))
    count = ranks * chunks
    parts = []
    for index in range(count):
        if stage_rank(index, ranks, schedule) == rank:
            later = WeightGradients() if parallel.splits_backward else None
            replicas = ReplicaSum((), mesh, 1 << 20)
            parts.append(StageModule(_Stage(seconds, later, index == 0), index, count, replicas, later))
    crossing = StageTensors((1, LENGTH, WIDTH), torch.float32, (1, LENGTH), WIDTH, mesh.device)
    cut = Microbatching(1, microbatches, lambda: None)
    runner = Scheduled(parts, crossing, lambda out, target: out.sum(), cut, 0, schedule, mesh.pp)
    tokens = torch.ones((microbatches, LENGTH), dtype=torch.int64)
    batch = Batch(0, tokens, tokens, torch.arange(microbatches))
    steps = []
    with _timed() as spent:
        for _ in range(runs + 1):
            spent.clear()
            dist.barrier()
            began = time.perf_counter()
            runner.forward_backward(batch)
            steps.append((began, time.perf_counter(), sum(spent)))
    return steps[1:]


def idle_share(ranks: list[tuple[float, float, float]]) -> float:
    """Return the share of time between the first begin and the last end in which ranks were not busy, their mean."""
    began, ended, busy = zip(*ranks, strict=True)
    return 1 - statistics.mean(busy) / (max(ended) - min(began))


def main() -> int:
    """Print a table of all schedules; return 1 when one is off."""
    parser = argparse.ArgumentParser(description="Measure the bubble of each pipeline schedule.")
    parser.add_argument("schedules", nargs="*", metavar="schedule", help=f"of {', '.join(SCHEDULES)} (default all)")
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches of a step (default 8)")
    parser.add_argument("--milliseconds", type=float, default=200.0, help="of F, I and W of a stage each (default 200)")
    parser.add_argument("--runs", type=int, default=5, help="steps that are timed (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    if unknown := set(asked.schedules) - SCHEDULES.keys():
        parser.error(f"no schedule {', '.join(sorted(unknown))}; choose from {', '.join(SCHEDULES)}")
    seconds = asked.milliseconds / 1000
    rows: list[dict[str, object]] = []
    with WorkerPool(asked.ranks) as pool:
        for schedule in asked.schedules or SCHEDULES:
            chunks = SCHEDULES[schedule]
            args = (schedule, chunks, asked.microbatches, seconds, asked.runs)
            ranks = pool.run(measure, *args, world=asked.ranks)
            measured = statistics.median(idle_share(list(step)) for step in zip(*ranks, strict=True))
            times = {Work.FORWARD: seconds, Work.INPUT: seconds, Work.WEIGHT: seconds, Work.BACKWARD: 2 * seconds}
            own = trace_schedule(Pipe(schedule, asked.ranks, chunks, asked.microbatches), times).idle_share
            rows.append(
                {"schedule": schedule, "idle": measured, "expected": own, "ok": abs(measured - own) <= own / 10}
            )
    if asked.json:
        print(json.dumps({"ok": all(row["ok"] for row in rows), "schedules": rows}, indent=2))
    else:
        print(f"{'schedule':<14}{'measured':>10}{'expected':>10}")
        for row in rows:
            print(f"{row['schedule']:<14}{row['idle']:>10.4f}{row['expected']:>10.4f}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
