"""`dist-llm plan budget.flops=...`: from a budget and a cluster to a model, its layout and cost, and a config."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.cli.parse import Answer, Command, add_json
from dist_llm.errors import ConfigError, StorageError, Violation

if TYPE_CHECKING:
    from dist_llm.config.decode import Decoded
    from dist_llm.config.request import PlanRequest
    from dist_llm.planner.plan import Plan

_EPILOG = """\
  dist-llm plan budget.flops=1e22 cluster=h100-sxm cluster.nodes=8 --write plan.yaml
  dist-llm plan budget.gpu_hours=20000 cluster=a100-80gb cluster.nodes=4 data.tokens=2e11 --json
  dist-llm plan budget.usd=5e4 cluster=h200 cluster.nodes=2 serving.tokens=1e12 law=fit.json

budget.{flops,gpu_hours,usd}: one of them. cluster=<preset>, cluster.nodes and any other figure of it. data.tokens: the
distinct tokens there are. serving.tokens: that the model will read and write. model.{family,vocab_size,...} fixes part
of the model, model=<preset> all of it. data.microbatch and parallel.{tensor,sequence,pipeline,virtual_pipeline,
schedule,context,expert,data,zero,recompute} fix part of the layout; the config that is written takes all other
settings of parallel. data.{seq_len,global_batch}, precision, engine, launcher, law.
What is written is a config: dist-llm launch --config FILE, dist-llm plan dry-run --config FILE.
Other commands: dist-llm plan layouts, dry-run, predict, ladder and fit; each has --help."""


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a request, and what to make of the plan."""
    parser.epilog = _EPILOG
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what the plan starts from")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the plan as the config of a run (YAML)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw isoflop.png and layouts.png in DIR")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts to show (default: 5)")
    add_json(parser)


def budget(arguments: argparse.Namespace) -> Answer:
    """Plan, and write and draw what is asked for."""
    from dist_llm.cli.compose import compose_request
    from dist_llm.config.decode import decode_as
    from dist_llm.config.request import PlanRequest
    from dist_llm.planner.advice import describe
    from dist_llm.planner.law_file import find_law
    from dist_llm.planner.plan import make_plan

    if arguments.top < 1:
        raise ConfigError([Violation("--top", arguments.top, "must be at least 1", (5,))])
    composed = compose_request(arguments.overrides)
    decoded = decode_as(PlanRequest, composed.tree)
    if problems := [*composed.violations, *map(_as_typed, decoded.violations)]:
        raise ConfigError([*problems, *_further(decoded)])
    try:
        plan = make_plan(decoded.config, find_law(decoded.config.law))
    except ConfigError as error:
        if not any(word.lstrip("+").startswith("cluster=") for word in arguments.overrides):
            error.add_note("no cluster is given, so this is of cluster=cpu: try cluster=h100-sxm cluster.nodes=8")
        raise
    data = describe(plan, arguments.top)
    if arguments.write is not None:
        _write(plan, arguments.write)
        data |= {"written": str(arguments.write), "commands": _commands(plan, arguments.write)}
    if arguments.pictures is not None:
        data["pictures"] = _draw(plan, arguments.pictures)
    return Answer(_text(data), data)


def _further(decoded: Decoded[PlanRequest]) -> Iterator[Violation]:
    """Yield what else is wrong with a request that could not be read whole, of what could be read."""
    from dist_llm.planner.law_file import find_law
    from dist_llm.planner.plan import check_request

    sections = {key.partition(".")[0] for key in decoded.unusable}
    if not {"budget", "cluster", "launcher"} & sections:
        yield from check_request(decoded.config)
    if "law" not in sections:
        try:
            find_law(decoded.config.law)
        except ConfigError as error:
            yield from error.violations


def _as_typed(violation: Violation) -> Violation:
    """Return a violation by the key that the user gave: of a chosen model, `model.*`."""
    inside = violation.key.removeprefix("preset.")
    return violation if inside == violation.key else replace(violation, key=f"model.{inside}")


def _write(plan: Plan, path: Path) -> None:
    from dist_llm.config.document import render_document

    try:
        path.write_text(render_document(plan.config), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _commands(plan: Plan, path: Path) -> list[str]:
    """Return the ways to start a written plan: our launcher, and torchrun on every node."""
    file = shlex.quote(str(path))
    nodes, each = plan.config.launcher.nodes, plan.config.launcher.nproc
    meeting = "--standalone" if nodes == 1 else "--rdzv-backend=c10d --rdzv-endpoint=<first node>:29500"
    torchrun = f"torchrun --nnodes={nodes} --nproc-per-node={each} {meeting} -m dist_llm train --config {file}"
    return [f"dist-llm launch --config {file}", torchrun]


def _draw(plan: Plan, folder: Path) -> list[str]:
    """Draw the budget's IsoFLOP curve and the front of layouts; return their paths."""
    from dist_llm.planner.front import Point, draw_front
    from dist_llm.planner.law_pictures import draw_isoflop
    from dist_llm.planner.laws import ParametricLaw

    pictures: dict[str, bytes] = {}
    if isinstance(plan.law, ParametricLaw):
        pictures["isoflop.png"] = draw_isoflop(plan.law, [plan.flops / 10, plan.flops, plan.flops * 10])
    points = [Point(each.peak_gib, each.step.seconds, each.name) for each in plan.ranking.fitting]
    pictures["layouts.png"] = draw_front(points, plan.request.cluster.memory_gib, points[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (folder / name).write_bytes(picture)
    except OSError as error:
        raise StorageError(f"cannot write into {folder}: {error.strerror}") from error
    return [str(folder / name) for name in pictures]


def _text(data: Mapping[str, Any]) -> str:
    """Return the plan for a person: a line a choice with its reason, then the layouts."""
    lines = [f"{reason['choice']}\n    {reason['because']}" for reason in data["reasons"]]
    lines.append("fastest layouts that fit:")
    for each in data["layouts"]:
        lines.append(
            f"  {each['step_seconds']:8.3f} s  MFU {100 * each['mfu']:4.1f} %  {each['memory_gib']['peak']:6.1f} GiB  "
            f"{each['name']}"
        )
    if "written" in data:
        lines += [f"written: {data['written']}", *(f"    {command}" for command in data["commands"])]
    lines += [f"drawn: {path}" for path in data.get("pictures", ())]
    return "\n".join(lines)


BUDGET = Command("from a budget to a model, its layout, time, money, and a config", add_budget_arguments, budget)
