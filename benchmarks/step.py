"""Time a training step of the quickstart's model over layouts: `make bench`, or `python benchmarks/step.py --json`.

Ranks are gloo processes of one pool with one thread each, on random tokens; the parent measures nothing. A layout's
figure is the median over the timed steps of its slowest rank. On a machine with fewer cores than ranks the ranks take
turns, so the table then shows what a layout costs, not what it gains.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from typing import Any

import torch

from dist_llm.cli.compose import compose
from dist_llm.config.checks import decode_and_check
from dist_llm.config.run import RunConfig
from dist_llm.engine.native import NativeEngine
from dist_llm.runtime.mesh import build_mesh
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.bench_step import random_batch

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ("parallel=single",)),
    "dp2 zero0": (2, ("parallel=single", "parallel.data=2", "parallel.zero=0")),
    "dp2 zero1": (2, ("parallel=single", "parallel.data=2", "parallel.zero=1")),
    "dp2 zero3": (2, ("parallel=single", "parallel.data=2", "parallel.zero=3")),
    "tp2 sequence": (2, ("parallel=tp2", "parallel.data=1")),
    "pp2 1f1b": (2, ("parallel=pp2", "parallel.data=1")),
    "pp2 dp2 tp2 zero1": (8, ("parallel=tp2pp2", "parallel.data=2")),
}
"""Name to number of ranks and what it changes in the quickstart; the last is the quickstart itself."""


def layout_config(ranks: int, overrides: tuple[str, ...], seq_len: int) -> RunConfig:
    """Return the quickstart's config on a layout, checked against its number of ranks."""
    sizes = (f"data.seq_len={seq_len}", f"launcher.nproc={ranks}")
    return decode_and_check(compose(["experiment=quickstart", *overrides, *sizes]), ranks)


def step_seconds(config: RunConfig, warm_up: int, steps: int) -> list[float]:
    """Train on this rank and return the seconds of each step after the warm-up."""
    engine = NativeEngine(config, build_mesh(config.parallel, torch.device("cpu")))
    seconds = []
    for step in range(warm_up + steps):
        batch = random_batch(config, engine.data_slice, step)
        start = time.perf_counter()
        engine.train_step(batch)
        seconds.append(time.perf_counter() - start)
    engine.close()
    return seconds[warm_up:]


def measure(name: str, pool: WorkerPool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one layout."""
    ranks, overrides = LAYOUTS[name]
    config = layout_config(ranks, overrides, arguments.seq_len)
    each = pool.run(step_seconds, config, arguments.warm_up, arguments.steps, world=ranks)
    slowest = [max(times) for times in zip(*each, strict=True)]
    median = statistics.median(slowest)
    tokens = config.data.global_batch * config.data.seq_len
    return {
        "layout": name,
        "ranks": ranks,
        "median_step_seconds": median,
        "fastest_step_seconds": min(slowest),
        "slowest_step_seconds": max(slowest),
        "tokens_per_second": tokens / median,
    }


def parse(words: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="time a training step of the quickstart's model over layouts")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a layout, at least 5 (default 5)")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them (default 1)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of a sequence (default 128)")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only this layout; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    arguments = parser.parse_args(words)
    if arguments.steps < 5 or arguments.warm_up < 1 or arguments.seq_len < 2:
        parser.error("needs --steps of 5 or more, --warm-up of 1 or more and --seq-len of 2 or more")
    return arguments


def main(words: list[str] | None = None) -> int:
    """Measure each layout in turn and print the table as it grows."""
    arguments = parse(words)
    names = arguments.layout or list(LAYOUTS)
    out = sys.stderr if arguments.json else sys.stdout
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"median of {arguments.steps} steps, {cores} cores, one thread a rank, torch {torch.__version__}", file=out)
    print(f"{'layout':<20}{'ranks':>6}{'median ms':>12}{'fastest':>10}{'slowest':>10}{'tokens/s':>11}", file=out)
    rows = []
    with WorkerPool(max(LAYOUTS[name][0] for name in names)) as pool:
        for name in names:
            row = measure(name, pool, arguments)
            rows.append(row)
            times = [1e3 * row[f"{which}_step_seconds"] for which in ("median", "fastest", "slowest")]
            print(
                f"{name:<20}{row['ranks']:>6}{times[0]:>12.1f}{times[1]:>10.1f}{times[2]:>10.1f}"
                f"{row['tokens_per_second']:>11,.0f}",
                file=out,
                flush=True,
            )
    if arguments.json:
        machine = {"cores": cores, "processor": platform.machine(), "torch": torch.__version__}
        settings = {"steps": arguments.steps, "warm_up": arguments.warm_up, "seq_len": arguments.seq_len}
        print(json.dumps({"machine": machine, "settings": settings, "layouts": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
