"""`dist-llm plan ladder`: the small runs that a scaling law is fitted to, as configs, scripts and a multirun."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config
from dist_llm.errors import ConfigError, Violation

if TYPE_CHECKING:
    from dist_llm.config.run import RunConfig
    from dist_llm.planner.ladder import LadderRun

_EPILOG = """\
Every run is the config with another size, length, batch and learning rate; model.num_layers, data.global_batch,
optimizer.lr and telemetry.eval_batches, where they are given, are all runs'. Sizes lie on either side of what the 2024
refit (or --law) thinks best for the budget; with --isoflop there are few budgets and at least five sizes at each.
--write DIR writes a config a run (DIR/configs/), a script (run.sh), a SLURM array (array.sbatch) and a Hydra multirun
(sweep.yaml, for dist-llm launch --multirun). Afterwards: dist-llm plan fit runs/NAME-ladder-*."""

MOST_RUNS = 1000


def add_ladder_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, budgets and the number of runs."""
    parser.epilog = _EPILOG
    add_config(parser)
    parser.add_argument("--flops", required=True, metavar="LOW:HIGH", help="budgets of the least and the largest run")
    parser.add_argument("--runs", type=int, default=12, metavar="N", help="how many runs (12)")
    parser.add_argument("--isoflop", action="store_true", help="a few budgets with several sizes each")
    parser.add_argument("--law", default="besiroglu", metavar="LAW", help="a published law or a law file (besiroglu)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the runs' files into DIR")
    add_json(parser)


def ladder(arguments: argparse.Namespace) -> Answer:
    """Plan the runs and write their files."""
    from dist_llm.cli.compose import parse_overrides
    from dist_llm.planner.ladder import KEEPABLE, LadderBase, plan_ladder
    from dist_llm.planner.law_file import find_law

    budgets = _budgets(arguments.flops)
    if not 1 <= arguments.runs <= MOST_RUNS:
        raise ConfigError([Violation("--runs", arguments.runs, f"must be from 1 to {MOST_RUNS}")])
    composed = compose_arguments(arguments)
    config = load_config(composed, None)
    said = frozenset(KEEPABLE) & parse_overrides(arguments.overrides).keys()
    base = LadderBase(config, config.launcher.nproc * config.launcher.nodes, said)
    runs = plan_ladder(base, find_law(arguments.law, "--law"), budgets, arguments.runs, arguments.isoflop)
    data: dict[str, object] = {"runs": [_as_data(run) for run in runs], "flops": sum(run.flops for run in runs)}
    lines = [
        f"{len(runs)} runs, {sum(run.flops for run in runs):.3g} FLOPs in all",
        f"{'run':<28} {'FLOPs':>9} {'parameters':>15} {'tokens':>17} {'steps':>9} {'batch':>6} {'lr':>9}  shape",
        *(_row(run) for run in runs),
        _say_data(config, max(run.tokens for run in runs)),
    ]
    if arguments.write is not None:
        written = _write(runs, arguments.write)
        data["files"] = [str(path) for path in written]
        place = shlex.quote(str(arguments.write))
        lines += [
            f"{len(written)} files written; start the runs by one of",
            f"  sh {place}/run.sh",
            f"  dist-llm launch --multirun {place}/sweep.yaml",
            f"  sbatch {place}/array.sbatch",
        ]
    return Answer("\n".join(lines), data)


def _say_data(config: RunConfig, most: int) -> str:
    """Return what the runs read, and which loss they will be known by."""
    if config.data.validation_fraction:
        loss = "each is evaluated at its end"
    else:
        loss = "nothing is kept for validation (data.validation_fraction), so they are known by their training loss"
    return (
        f"the longest run reads {most:,} tokens of {config.data.path}, again from its beginning where it ends; {loss}"
    )


def _write(runs: list[LadderRun], folder: Path) -> list[Path]:
    """Write the files of a ladder and return their paths."""
    from dist_llm.launcher.base import plan_launch, worker_argv
    from dist_llm.launcher.slurm import render_array
    from dist_llm.planner.ladder_files import config_paths, ladder_files, write_files

    config = runs[0].config
    plan = plan_launch(worker_argv([]), config.launcher, config.parallel)
    return write_files(ladder_files(runs, folder, render_array(plan, config, config_paths(runs, folder))))


def _budgets(text: str) -> tuple[float, float]:
    """Return the budgets of --flops."""
    low, _, high = text.partition(":")
    try:
        found = (float(low), float(high or low))
    except ValueError:
        found = (math.nan, math.nan)
    if not (0 < found[0] <= found[1] < 1e40):
        rule = "must be two budgets in FLOPs, the lower first"
        raise ConfigError([Violation("--flops", text, rule, ("1e13:1e15",))])
    return found


def _as_data(run: LadderRun) -> dict[str, object]:
    return {
        "name": run.name,
        "flops": run.flops,
        "num_params": run.num_params,
        "tokens": run.tokens,
        "overrides": run.overrides,
    }


def _row(run: LadderRun) -> str:
    config = run.config
    shape = f"{config.model.num_layers} x {config.model.hidden_size}, {config.model.num_heads} heads"
    return (
        f"{run.name:<28} {run.flops:>9.3g} {run.num_params:>15,} {run.tokens:>17,} {config.run.steps:>9,} "
        f"{config.data.global_batch:>6} {config.optimizer.lr:>9.2g}  {shape}"
    )


LADDER = Command("small runs to fit a scaling law to, as configs, scripts and a multirun", add_ladder_arguments, ladder)
