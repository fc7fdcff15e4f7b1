"""`dist-llm plan layouts`: which layouts are legal, and how a pipeline schedule would go; and the group `plan`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dist_llm.cli.dry_run import DRY_RUN
from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments
from dist_llm.cli.plan_budget import BUDGET
from dist_llm.cli.plan_calibrate import CALIBRATE
from dist_llm.cli.plan_fit import FIT
from dist_llm.cli.plan_ladder import LADDER
from dist_llm.cli.plan_predict import PREDICT
from dist_llm.errors import ConfigError, ExitCode, StorageError, Violation

if TYPE_CHECKING:
    from dist_llm.config.run import RunConfig

MOST_LISTED = 20
"""Layouts that are printed as text unless all are asked for."""

_LAYOUTS = """\
The config's own layout is judged first: every rule that it breaks, and the legal layouts nearest to it. Then all legal
layouts of its model and batch on so many ranks follow: as text the 20 nearest to the config's own, or with --all every
one; --json has every one. `dist-llm config rules` prints the rules.
--schedule-trace draws the pipeline schedule that the config asks for: when each rank works, how long it idles, and how
many microbatches it holds. A forward and each half of a backward are taken as equally long. What ranks exchange is
proven to match and to end."""


def add_layouts_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, the number of ranks, and what to draw."""
    parser.epilog = _LAYOUTS
    add_config(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks (default: launcher.nproc x launcher.nodes)")
    parser.add_argument("--all", action="store_true", help="print every legal layout, not only the nearest")
    parser.add_argument("--schedule-trace", type=Path, metavar="FILE", help="draw the pipeline schedule as FILE (PNG)")
    add_json(parser)


def layouts(arguments: argparse.Namespace) -> Answer:
    """Judge the config's layout, list all legal ones, and draw its schedule."""
    from dist_llm.config.checks import check
    from dist_llm.config.decode import decode_partly
    from dist_llm.planner.layouts import judge_layout, legal_layouts, nearest_layouts

    composed = compose_arguments(arguments)
    decoded = decode_partly(composed.tree)
    config = decoded.config
    ranks = config.launcher.nproc * config.launcher.nodes if arguments.ranks is None else arguments.ranks
    if not 1 <= ranks <= 2**20:
        raise ConfigError([Violation("--ranks", ranks, "must be from 1 to 1048576")])
    if problems := [*composed.violations, *decoded.violations]:
        raise ConfigError([*problems, *check(config, ranks, decoded.unusable | composed.unusable)])
    found = legal_layouts(config, ranks)
    verdict = judge_layout(config, ranks, found)
    data: dict[str, object] = {
        "ok": verdict.legal,
        "ranks": ranks,
        "legal": verdict.legal,
        "violations": [vars(violation) | {"legal": list(violation.legal)} for violation in verdict.violations],
        "elsewhere": [violation.key for violation in verdict.elsewhere],
        "nearest": list(verdict.nearest),
        "layouts": found,
    }
    lines = [f"ranks: {ranks}", f"the config's layout is {'legal' if verdict.legal else 'not legal'}"]
    lines += [f"  {violation}" for violation in verdict.violations]
    lines += [f"  near: {_overrides(layout)}" for layout in verdict.nearest]
    lines += [f"  no layout mends {violation.key}" for violation in verdict.elsewhere]
    if arguments.schedule_trace is not None and verdict.legal:
        data["schedule"] = _trace(config, ranks, arguments.schedule_trace)
        lines.append(f"schedule drawn: {arguments.schedule_trace}")
    elif arguments.schedule_trace is not None:
        lines.append("no schedule drawn: the layout is not legal")
    listed = [] if arguments.as_json else found if arguments.all else nearest_layouts(config, found, MOST_LISTED)
    shown = "" if len(listed) == len(found) else f", the {len(listed)} nearest (--all prints every one)"
    lines += [f"{len(found)} legal layouts{shown}:", *(f"  {_overrides(layout)}" for layout in listed)]
    return Answer("\n".join(lines), data, ExitCode.DONE if verdict.legal else ExitCode.CONFIG)


def _overrides(layout: Mapping[str, object]) -> str:
    """Return a layout as a user types it; what is 1, off or without effect is left out."""
    from dist_llm.config.wording import shown
    from dist_llm.planner.layouts import SETTINGS

    sizes = {"tensor", "context", "context_heads", "pipeline", "data", "expert", "replicate", "virtual_pipeline"}
    words = [f"parallel.{name}={value}" for name, value in layout.items() if name in sizes and value != 1]
    if layout["sequence"]:
        words.append("parallel.sequence=true")
    if layout["context"] != 1:
        words.append(f"parallel.context_method={layout['context_method']}")
    if layout["pipeline"] != 1:
        words.append(f"parallel.schedule={layout['schedule']}")
    mended = [f"parallel.{name}={shown(value)}" for name, value in layout.items() if name not in SETTINGS]
    return " ".join([*words, f"parallel.zero={layout['zero']}", *mended])


def _trace(config: RunConfig, ranks: int, path: Path) -> dict[str, object]:
    """Prove and draw the schedule; return what the picture shows."""
    from dist_llm.accounting.schedules import Pipe
    from dist_llm.config.rules import num_microbatches
    from dist_llm.planner.messages import prove, write_programs
    from dist_llm.planner.schedule_picture import draw_schedule
    from dist_llm.planner.schedule_trace import trace_schedule

    parallel, microbatches = config.parallel, num_microbatches(config, ranks)
    if parallel.pipeline == 1 or microbatches is None:
        rule = "must be above 1 for --schedule-trace: one rank has no schedule"
        raise ConfigError([Violation("parallel.pipeline", parallel.pipeline, rule)])
    pipe = Pipe(parallel.schedule, parallel.pipeline, parallel.chunks, microbatches)
    prove(pipe, write_programs(pipe))
    trace = trace_schedule(pipe)
    try:
        path.write_bytes(draw_schedule(trace))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return {
        "picture": str(path),
        "microbatches": microbatches,
        "idle_share": trace.idle_share,
        "most_in_flight": [trace.most_in_flight(rank) for rank in range(pipe.ranks)],
    }


COMMANDS = {
    "": BUDGET,
    "layouts": Command("the legal layouts on so many ranks; a schedule as a picture", add_layouts_arguments, layouts),
    "dry-run": DRY_RUN,
    "predict": PREDICT,
    "ladder": LADDER,
    "fit": FIT,
    "calibrate": CALIBRATE,
}
