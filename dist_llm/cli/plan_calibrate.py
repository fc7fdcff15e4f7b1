"""`dist-llm plan calibrate RUN...`: a hardware file of this machine from runs that were timed on it."""

from __future__ import annotations

import argparse
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dist_llm.cli.parse import Answer, Command, add_json
from dist_llm.errors import ConfigError, DataError, StorageError, Violation

if TYPE_CHECKING:
    from dist_llm.planner.calibration import Calibration, Observation

_EPILOG = """\
  dist-llm plan calibrate runs/* --write box.yaml
  dist-llm plan predict cluster=box.yaml model=llama-tiny parallel.tensor=2 --json

RUN is the folder of a run: config.yaml and the step_seconds of metrics.jsonl, the first quarter of them left out. Runs
should differ in what they are bound by: a wide model, a narrow one, tensor ranks, data ranks, a long pipeline. Of runs
whose steps do the same the fastest step counts: what else a machine does lengthens steps. --hold-out names runs that
are predicted and not fitted; none may be a repeat of one that is."""

FEWEST_STEPS = 4
LONGEST_STEP = 1e7
"""Seconds of a step above which metrics are damaged."""

FAR, MOST_ERROR = 10, 0.15
"""Figures that are moved by more than the first, and mean errors above the second, are spoken of."""

UNSTEADY = 1.5
"""Repeats of a run whose slowest takes this many times the fastest's step are spoken of."""

FEWEST_JUDGED = 5
"""Runs that must be held out for the hardware file to say how far off its steps are."""


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Take folders of runs, and where to write."""
    parser.epilog = _EPILOG
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--hold-out", nargs="+", type=Path, default=[], metavar="RUN", help="predict these, fit them not"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the hardware file (YAML), for cluster=FILE")
    add_json(parser)


def calibrate_runs(arguments: argparse.Namespace) -> Answer:
    """Fit the hardware's figures to the runs and show predicted beside measured."""
    from dist_llm.config.document import render_document
    from dist_llm.planner.calibration import calibrate, join_repeats, predicted_seconds

    held_out = {path.resolve() for path in arguments.hold_out}
    fitted = join_repeats([_observe(path) for path in arguments.runs if path.resolve() not in held_out])
    if not fitted:
        raise ConfigError("every run is held out: leave one at least to fit")
    others = join_repeats([_observe(path) for path in arguments.hold_out])
    cluster = fitted[0].config.cluster
    for each in (*fitted, *others):
        if each.config.cluster.device != cluster.device:
            rule = f"is not the {cluster.device} of {fitted[0].name}: one hardware file is of one machine"
            raise ConfigError([Violation(f"{each.name}: cluster.device", each.config.cluster.device, rule)])
    _refuse_repeats(fitted, others)
    found = calibrate(cluster, fitted)
    blind = {each.name: predicted_seconds(each, found.cluster) / each.step_seconds - 1 for each in others}
    source = f"calibrated on {len(fitted)} runs, from {cluster.name}"
    usual = [(1 + blind[each.name]) * each.step_seconds / each.usual_seconds - 1 for each in others]
    named = found.cluster.model_copy(update={"source": source, "step_error": _step_error(usual)})
    data: dict[str, object] = {
        "cluster": named.model_dump(mode="json"),
        "figures": {name: {"before": before, "after": after} for name, (before, after) in found.moved.items()},
        "runs": [_row(each, found.before[each.name], found.after[each.name]) for each in fitted],
        "held_out": [_row(each, None, blind[each.name]) for each in others],
        "mean_error": found.mean_error,
        "notes": (notes := [*_doubts(found), *_unsteady([*fitted, *others])]),
    }
    lines = [f"{name}: {before:.4g} -> {after:.4g}" for name, (before, after) in found.moved.items()]
    lines += [f"  {each.name}: {each.step_seconds:.4g} s, predicted {found.after[each.name]:+.1%}" for each in fitted]
    lines += [
        f"  held out {each.name}: {each.step_seconds:.4g} s, predicted {blind[each.name]:+.1%}" for each in others
    ]
    lines += notes
    if arguments.write is not None:
        try:
            arguments.write.write_text(render_document(named), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {arguments.write}: {error.strerror}") from error
        data["written"] = str(arguments.write)
        lines.append(f"written: {arguments.write}")
    return Answer("\n".join(lines), data)


def _refuse_repeats(fitted: list[Observation], held_out: list[Observation]) -> None:
    """Raise ConfigError where a run that is held out is a repeat of one that is fitted."""
    from dist_llm.planner.calibration import step_key

    seen = {step_key(each): each.name for each in fitted}
    repeats = [(each.name, seen[key]) for each in held_out if (key := step_key(each)) in seen]
    if repeats:
        rule = "is a repeat of {}, which is fitted, and so no unseen run: hold out both or neither"
        raise ConfigError([Violation("--hold-out", name, rule.format(other)) for name, other in repeats])


def _doubts(found: Calibration) -> list[str]:
    """Return why the figures may be worth little: few runs, a figure far from the preset's, runs that do not fit."""
    doubts = []
    if len(found.after) < len(found.moved):
        doubts.append(f"{len(found.after)} runs for {len(found.moved)} figures: what they do not show stays as it was")
    far = [name for name, (before, after) in found.moved.items() if not 1 / FAR < after / before < FAR]
    if far:
        doubts.append(f"{', '.join(far)}: more than {FAR} times off the file's; was the machine doing other work?")
    if found.mean_error > MOST_ERROR:
        doubts.append(f"fitted runs are {found.mean_error:.0%} off in the mean: do not rely on these figures")
    return doubts


def _unsteady(observations: list[Observation]) -> list[str]:
    """Return which runs took another time when they were run again."""
    return [
        f"{each.name}: its repeats take {min(each.repeats):.4g} to {max(each.repeats):.4g} s a step"
        for each in observations
        if each.repeats and max(each.repeats) > UNSTEADY * min(each.repeats)
    ]


def _step_error(errors: list[float]) -> float | None:
    """Return within what part of their median steps nine of ten runs that were not fitted were foretold.

    None with fewer than FEWEST_JUDGED. A plan's days are of usual steps, so of repeats too it is medians that count.
    """
    if len(errors) < FEWEST_JUDGED:
        return None
    return round(min(0.99, max(0.001, sorted(map(abs, errors))[math.ceil(0.9 * len(errors)) - 1])), 3)


def _row(observation: Observation, before: float | None, after: float) -> dict[str, object]:
    seconds = observation.step_seconds
    return {
        "name": observation.name,
        "repeats": observation.repeats,
        "measured_seconds": seconds,
        "predicted_seconds": seconds * (1 + after),
        "error": after,
        "error_before": before,
    }


def _observe(folder: Path) -> Observation:
    """Return the run in a folder. ConfigError where it is no run's, DataError where too few of its steps are timed."""
    from dist_llm.config.decode import decode
    from dist_llm.config.document import read_document
    from dist_llm.planner.calibration import Observation, settled_seconds
    from dist_llm.telemetry.records import CONFIG_FILE, METRICS_FILE, read_metrics

    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError([Violation("RUN", str(folder), f"holds no {CONFIG_FILE}: it is not the folder of a run")])
    config = decode(read_document(folder / CONFIG_FILE))
    lines = [line for line in read_metrics(folder) if line.step_seconds is not None]
    for line in lines:
        if type(line.step_seconds) not in (int, float) or not 0 < float(line.step_seconds or 0) < LONGEST_STEP:
            place = f"{folder / METRICS_FILE}:{_line_number(folder / METRICS_FILE, line.step)}"
            raise DataError(f"{place}: step_seconds={line.step_seconds} is no time of a step: above 0 and below 1e7 s")
    seconds = [float(line.step_seconds or 0) for line in lines]
    if len(seconds) < FEWEST_STEPS:
        raise DataError(f"{folder}: {len(seconds)} steps are timed, and {FEWEST_STEPS} are needed")
    launcher = config.launcher
    return Observation(str(folder), config, launcher.nproc * launcher.nodes, *settled_seconds(seconds))


def _line_number(path: Path, step: int) -> int:
    """Return the number of the last line of a step, from 1."""
    found = 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        with suppress(ValueError, AttributeError):
            found = number if json.loads(line).get("step") == step else found
    return found


CALIBRATE = Command("a hardware file of this machine from runs on it", add_calibrate_arguments, calibrate_runs)
