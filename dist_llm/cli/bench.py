"""`dist-llm bench`: how fast is it here? A training step on several engines, or single kernels: a table or JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dist_llm.cli.bench_collectives import COLLECTIVES
from dist_llm.cli.parse import Answer, Command, add_config, add_json
from dist_llm.cli.table import table
from dist_llm.errors import ConfigError, Violation

if TYPE_CHECKING:
    from dist_llm.config.run import RunConfig

_STEP = """\
engine=NAMES says which engines: a comma list (engine=native,deepspeed), one, which is then compared with native, or
all. Without it, or with all, every engine that is installed and can run the config's layout is timed, and the others
are listed with the reason. The ranks are started on this machine, launcher.nproc of them or as many as the layout
takes, with the threads that a run's ranks have, and each engine has its own. They take turns, a round each, while the
others wait: a step that is not timed and --steps that are. Tokens are random: no data are needed. Figures:
  ms a step     the median over rounds of the slowest rank's mean, and the range of rounds
  ratio         of tokens a second to native's in the same round, the median and range of rounds
  sent          MiB that leave the rank with most in a step, each collective counted as a ring's, and how many these are
  peak memory   of the rank with most: resident, the engine's libraries included; on CUDA what torch allocated
  state         MiB of parameters and optimizer state on the rank with most"""


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, engines, and how long to measure."""
    parser.epilog = _STEP
    add_config(parser)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps of a round (default 5)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds of each engine (default 5)")
    add_json(parser)


def step(arguments: argparse.Namespace) -> Answer:
    """Time a step on engines side by side."""
    for option in ("steps", "repeats"):
        if not 1 <= getattr(arguments, option) <= 10**4:
            raise ConfigError([Violation(f"--{option}", getattr(arguments, option), "must be from 1 to 10000")])
    named, arguments.overrides = take_engines(arguments.overrides)
    config = _decoded(arguments)
    from dist_llm.runtime.log import configure_logging, get_logger
    from dist_llm.train.bench_step import bench_step
    from dist_llm.train.engines import read_names, with_reference

    engines: Sequence[str] | None = None
    if named is None and config.engine.name != "native":
        named = config.engine.name
    if named not in (None, "all"):
        engines = read_names("engine", str(named))
        engines = with_reference(engines) if len(engines) == 1 else engines
    configure_logging(0, arguments.debug)
    report = get_logger("cli.bench").info
    facts = bench_step(config, engines=engines, steps=arguments.steps, repeats=arguments.repeats, report=report)
    return Answer(describe(facts), facts)


def take_engines(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return what `engine=` says last, None without it, and the other overrides: it may name more than one preset."""
    mine = [text for text in overrides if text.startswith("engine=")]
    value = mine[-1].partition("=")[2].strip("'\"[]") if mine else None
    return value, [text for text in overrides if text not in mine]


def _decoded(arguments: argparse.Namespace) -> RunConfig:
    """Return the config; rules are left to each engine. Raises ConfigError with every slip in a setting."""
    from dist_llm.cli.parse import compose_arguments
    from dist_llm.config.checks import check
    from dist_llm.config.decode import decode_partly

    composed = compose_arguments(arguments)
    decoded = decode_partly(composed.tree)
    if slips := [*composed.violations, *decoded.violations]:
        unusable = decoded.unusable | frozenset(composed.unusable)
        raise ConfigError([*slips, *check(decoded.config, None, unusable)])
    return decoded.config


_SETTING = ("layout", "batch", "precision", "device", "processor", "cores", "threads", "torch", "steps", "repeats")


def describe(facts: Mapping[str, Any]) -> str:
    """Return the figures as text: where and what was measured, a table of engines, one of collectives, who is out."""
    where = "\n".join(f"{name}: {facts[name]}" for name in _SETTING)
    engines = table([_engine_cells(row) for row in facts["engines"]])
    traffic = [_traffic_cells(row) for row in facts["collectives"]]
    left_out = [f"left out: {name}: {why}" for name, why in facts["left_out"].items()]
    return "\n\n".join([where, engines, table(traffic) if traffic else "no collectives", *left_out])


def _engine_cells(row: Mapping[str, Any]) -> dict[str, str]:
    fastest, median, slowest = (1e3 * row[f"{which}step_seconds"] for which in ("fastest_", "", "slowest_"))
    return {
        "engine": row["engine"],
        "ms a step": f"{median:.1f} ({fastest:.1f}-{slowest:.1f})",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "ratio": f"{row['ratio']:.3f} ({row['least_ratio']:.3f}-{row['greatest_ratio']:.3f})",
        "sent MiB": _mib(row["sent_bytes"]),
        "collectives": str(row["collectives"]),
        "peak GiB": f"{row['peak_memory_gib']:.3f}",
        "state MiB": _mib(row["state_bytes"]),
        "MFU": "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %",
        "loss": f"{row['loss']:.6f}",
    }


def _traffic_cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "engine": row["engine"],
        "a step's": row["kind"],
        "of a rank": str(row["count"]),
        "payload MiB": _mib(row["payload_bytes"]),
        "sent MiB": _mib(row["sent_bytes"]),
        "of all ranks": str(row["all_count"]),
        "payload MiB of all": _mib(row["all_payload_bytes"]),
        "sent MiB of all": _mib(row["all_sent_bytes"]),
    }


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f}"


_KERNELS = """\
Times each op that has more than one backend, in fp32, at the sizes of a small model: PyTorch's functions (eager),
torch.compile of them (inductor) and every backend that loads here (`dist-llm doctor` says why another does not), which
take turns. The least time of all rounds counts. The last column says how often faster than eager and than inductor the
best of the others is."""


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    """Take ops, threads, and how long to measure."""
    parser.epilog = _KERNELS
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to time (default: all)")
    parser.add_argument("--threads", default="1,2", metavar="N,N", help="numbers of threads (default 1,2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to time on (default cpu)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="rounds of each variant (default 30)")
    add_json(parser)


def kernels(arguments: argparse.Namespace) -> Answer:
    """Time ops side by side."""
    counts = arguments.threads.split(",")
    slips = []
    if not all(count.isdecimal() and 1 <= int(count) <= 4096 for count in counts):
        slips.append(Violation("--threads", arguments.threads, "must be numbers from 1 to 4096, such as 1,2"))
    if not 1 <= arguments.rounds <= 10**6:
        slips.append(Violation("--rounds", arguments.rounds, "must be from 1 to 1000000"))
    if slips:
        raise ConfigError(slips)
    from dist_llm.runtime.log import configure_logging, get_logger
    from dist_llm.train.bench_kernels import TIMED, bench_kernels

    slips = [Violation("OP", name, "is no op that is timed", TIMED) for name in arguments.ops if name not in TIMED]
    if slips:
        raise ConfigError(slips)
    configure_logging(0, arguments.debug)
    report = get_logger("cli.bench").info
    threads = [int(count) for count in counts]
    facts = bench_kernels(arguments.ops or TIMED, threads, arguments.rounds, report, arguments.device)
    where = "\n".join(f"{name}: {facts[name]}" for name in ("processor", "isa", "torch", "dtype", "rounds"))
    return Answer(f"{where}\n\n{table(_kernel_cells(facts['rows']))}", facts)


def _kernel_cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the table's rows: milliseconds of every variant that any row has, and how they compare."""
    facts = ("op", "shape", "threads", "pass")
    variants = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in facts]
    ordered = [*("eager", "inductor"), *(name for name in variants if name not in ("eager", "inductor"))]

    def cells(row: Mapping[str, Any]) -> dict[str, str]:
        best = min(row[name] for name in ordered[2:] if row.get(name) is not None)
        return {
            "op": row["op"],
            "shape": "x".join(map(str, row["shape"])),
            "threads": str(row["threads"]),
            "pass": row["pass"],
            **{f"{name} ms": "-" if row.get(name) is None else f"{1e3 * row[name]:.3f}" for name in ordered},
            "eager, inductor / best": f"{row['eager'] / best:.2f}, {row['inductor'] / best:.2f}",
        }

    return [cells(row) for row in rows]


COMMANDS = {
    "step": Command("time a training step on several engines side by side", add_step_arguments, step),
    "kernels": Command(
        "time single ops: every backend that loads, eager PyTorch, torch.compile", add_kernel_arguments, kernels
    ),
    "collectives": COLLECTIVES,
}
