"""Time a training step of ours beside its peers on the same work, in one run and in turns.

    python -m benchmarks.peers [--cases NAME ...] [--rounds N] [--json]

Tokens a second, the median over rounds of the slowest rank: ours, the same model in a bare loop, plain PyTorch, the
step's own matrix products, DeepSpeed, Megatron-Core, transformers + accelerate. All are stock and on the CPU, in fp32,
with the same shapes, tokens, update and clip. Who cannot run a case is null, and stderr says why.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if str(Path(__file__).resolve().parents[1]) not in sys.path:  # started by its path
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.peers_rounds import CONTESTANTS, Start, run_rounds
from dist_llm.cli.compose import compose
from dist_llm.config.checks import decode_and_check
from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from dist_llm.runtime.process import prepare_rank

GPT_14M = (
    *("model=gpt2-tiny", "model.num_layers=6", "model.hidden_size=384", "model.num_heads=6"),
    *("model.ffn_hidden_size=1536", "model.vocab_size=8192", "model.norm=rmsnorm", "model.bias=false"),
    *("parallel=single", "data.seq_len=256", "data.global_batch=8"),
)
"""13.9 million parameters: 6 layers of width 384, 8 sequences of 256 tokens."""
PEERS = ("ours", "plain", "deepspeed", "megatron", "transformers")


@dataclass(frozen=True)
class Case:
    """A model in a layout: ranks, threads of each, settings, timed steps of a round, and who is timed."""

    ranks: int
    threads: int
    overrides: tuple[str, ...]
    steps: int = 1
    names: tuple[str, ...] = PEERS

    def config(self) -> RunConfig:
        """Return the run that the case is a step of."""
        more = (f"launcher.nproc={self.ranks}", f"launcher.threads={self.threads}", "device=cpu")
        return decode_and_check(compose([*self.overrides, *more]), self.ranks)


def gpt_14m(*layout: str) -> tuple[str, ...]:
    """Return the overrides of the model of 14 million parameters in a layout."""
    return (*GPT_14M, *layout)


CASES: dict[str, Case] = {
    "gpt-14m 1 thread": Case(1, 1, gpt_14m("data.microbatch=8"), names=tuple(CONTESTANTS)),
    "gpt-14m 2 threads": Case(1, 2, gpt_14m("data.microbatch=8"), names=tuple(CONTESTANTS)),
    "quickstart 1 thread": Case(1, 1, ("experiment=quickstart", "parallel=single"), 2, tuple(CONTESTANTS)),
    "gpt-14m dp2": Case(2, 1, gpt_14m("data.microbatch=4", "parallel.data=2", "parallel.zero=1")),
    "gpt-14m tp2": Case(2, 1, gpt_14m("data.microbatch=8", "parallel.tensor=2")),
    "gpt-14m pp2": Case(2, 1, gpt_14m("data.microbatch=2", "parallel.pipeline=2")),
    "gpt-14m dp2 tp2": Case(
        4, 1, gpt_14m("data.microbatch=4", "parallel.data=2", "parallel.tensor=2", "parallel.zero=1")
    ),
}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return the figures of a case: tokens a second of each contestant, and the median ratio of ours to it."""
    case = CASES[name]
    config = case.config()
    prepare = partial(prepare_rank, "cpu", case.ranks, case.threads)
    seconds: list[dict[str, float]] = []
    with WorkerPool(case.ranks, timeout_seconds=300.0, prepare=prepare) as pool:
        stream = pool.stream(run_rounds, config, case.names, rounds, case.steps, world=case.ranks)
        starts = next(stream)
        left_out = left_out_of(starts)
        for ranks in stream:
            slowest = {each: max(rank[each] for rank in ranks) for each in ranks[0] if each not in left_out}
            seconds.append(slowest)
            times = ", ".join(f"{each} {1e3 * value:.0f}" for each, value in slowest.items())
            say(f"{name}: round {len(seconds)} of {rounds}: ms a step: {times}")
    for each, why in left_out.items():
        say(f"{name}: {each} is null: {why}")
    tokens = config.data.global_batch * config.data.seq_len
    row: dict[str, Any] = {"name": name, "ranks": case.ranks, "threads": case.threads}
    ratios: dict[str, float] = {}
    for each in CONTESTANTS:
        own = [one[each] for one in seconds if each in one]
        row[each] = tokens / statistics.median(own) if own else None
        if own and each != "ours":
            ratios[each] = statistics.median(one[each] / one["ours"] for one in seconds)
    return {**row, "ratios": ratios}


def left_out_of(starts: Sequence[Start]) -> dict[str, str]:
    """Return why contestants are not timed: the first rank's reason, or a first loss that is not that of the work."""
    reasons = {each: why for start in reversed(starts) for each, why in start.left_out.items()}
    if "ours" in reasons:
        raise RuntimeError(reasons["ours"])
    ours = starts[0].losses["ours"]
    for start in starts:
        for each, loss in start.losses.items():
            bound = 1e-3 if each in start.same_start else 0.05
            if math.isfinite(loss) and abs(loss - ours) > bound * ours:
                reasons.setdefault(each, f"its first loss is {loss:.6f} and ours {ours:.6f}")
    return reasons


def say(message: str) -> None:
    """Write a line to stderr."""
    print(message, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return tokens a second by case, and below them the ratios of ours."""
    lines = [f"{'tokens a second':<22}" + "".join(f"{each:>14}" for each in CONTESTANTS)]
    for row in rows:
        cells = (("null" if row[each] is None else f"{row[each]:,.0f}") for each in CONTESTANTS)
        lines.append(f"{row['name']:<22}" + "".join(f"{cell:>14}" for cell in cells))
    lines += ["", f"{'ours over':<22}" + "".join(f"{each:>14}" for each in CONTESTANTS)]
    for row in rows:
        cells = (f"{row['ratios'][each]:.3f}" if each in row["ratios"] else "" for each in CONTESTANTS)
        lines.append(f"{row['name']:<22}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="time a training step of ours beside its peers on the same work")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of each contestant (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args(words)
    if arguments.rounds < 1:
        parser.error("needs --rounds of 1 or more")
    return arguments


def main(words: list[str] | None = None) -> int:
    """Measure the cases one after another."""
    arguments = parse(words)
    rows = [measure(name, arguments.rounds) for name in arguments.cases]
    print(json.dumps({"cases": rows}, indent=1) if arguments.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
