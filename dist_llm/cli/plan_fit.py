"""`dist-llm plan fit`: a scaling law of one's own runs, how far it may be trusted, and its curves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from dist_llm.cli.parse import Answer, Command, add_json
from dist_llm.errors import ConfigError, Violation

if TYPE_CHECKING:
    from dist_llm.planner.fitting import Run
    from dist_llm.planner.laws import Optimum
    from dist_llm.planner.run_table import FolderRun
    from dist_llm.planner.trust import Fit, Prediction, Trust

_EPILOG = """\
A RUN is the folder of a run, or a CSV or JSONL table with columns params, tokens (or flops) and loss; --columns says
what they are called there. Of a folder the loss is its last evaluation if every folder has one after its last step, or
else the mean over the last twentieth of its steps (--loss training: always); a run that has not reached run.steps is
left out.

The fit is that of Hoffmann et al. 2022, appendix D.2: L(N, D) = E + A / N^alpha + B / D^beta by Huber's loss of ln L,
L-BFGS from a grid of starts. With fewer than 100 runs both exponents are also held near 0.35 +- 0.1, where published
ones lie, as firmly as the scatter of the runs allows; --prior none leaves it to the runs alone. Intervals hold 95 %."""

MOST_ERROR = 0.03
"""Mean error of the largest runs predicted from the rest with which a law is trusted beyond its runs."""

UNLIKE, FEW_TOKENS = 1.1, 2**16
"""Evaluations of tokens that differ by more than the first, or of fewer than the second, are spoken of."""

FORESIGHT = (1.0, 10.0, 100.0)
"""Budgets at which the best size is said, over the compute of the largest run."""


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Take runs, which of them to leave out, and what to write."""
    parser.epilog = _EPILOG
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a table of runs")
    parser.add_argument("--columns", default="", metavar="A=B,...", help="columns of a table: params=N,loss=c4_en")
    parser.add_argument("--exclude", action="append", default=[], metavar="NAME", help="leave runs out (* matches)")
    parser.add_argument("--exclude-worst", type=int, default=0, metavar="K", help="leave the K runs of most loss out")
    parser.add_argument(
        "--hold-out", action="append", default=[], metavar="NAME", help="predict runs instead (* matches)"
    )
    parser.add_argument(
        "--loss", choices=("auto", "validation", "training"), default="auto", help="which of folders (auto: see below)"
    )
    parser.add_argument("--non-embedding", action="store_true", help="count no embeddings (folders only)")
    parser.add_argument("--prior", choices=("auto", "none", "published"), default="auto", help="on both exponents")
    parser.add_argument("--isoflop", action="store_true", help="also fit a parabola a budget (approach 2)")
    parser.add_argument("--name", default="own", metavar="NAME", help="what to call the law (own)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (0)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the law as JSON, for plan law=FILE")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="draw the fit as FILE (PNG)")
    add_json(parser)


def fit(arguments: argparse.Namespace) -> Answer:
    """Fit a law to the runs, judge it, and write and draw what was asked for."""
    from dataclasses import replace

    from dist_llm.planner.fitting import PUBLISHED_PRIOR
    from dist_llm.planner.trust import FEWEST_RUNS, fit_law, usual_prior

    found, notes = _read(arguments)
    runs, held_out = _choose(found, arguments)
    if len(runs) < FEWEST_RUNS:
        left_out = "".join(f"; {note}" for note in notes if "left out" in note)
        rule = f"are too few to fit five constants to: at least {FEWEST_RUNS} finished runs{left_out}"
        raise ConfigError([Violation("RUN", f"{len(runs)} runs", rule)])
    for name, what in (("num_params", "parameters"), ("tokens", "tokens")):
        if len({getattr(run, name) for run in runs}) == 1:
            rule = f"all have {getattr(runs[0], name):,.0f} {what}, and show nothing of how loss falls with more"
            raise ConfigError([Violation("RUN", f"{len(runs)} runs", rule)])
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError([Violation("--seed", arguments.seed, "must be from 0 to 9223372036854775807")])
    prior = {"auto": usual_prior(len(runs)), "none": None, "published": PUBLISHED_PRIOR}[arguments.prior]
    fitted = fit_law(runs, arguments.name, prior=prior, seed=arguments.seed)
    fitted = replace(fitted, law=replace(fitted.law, counts_embeddings=not arguments.non_embedding))
    predictions = [fitted.predict(run) for run in held_out]
    data = _describe(fitted, predictions) | {"notes": notes}
    lines = [*notes, *_say(fitted, predictions)]
    if arguments.isoflop:
        data["isoflop"], more = _isoflop(runs)
        lines += more
    lines += _write(arguments, fitted, predictions)
    return Answer("\n".join(lines), data)


def _read(arguments: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """Return the runs of all folders and tables, and what is to be said of them."""
    from dist_llm.planner.run_table import read_folder, read_table

    names = _columns(arguments.columns)
    tables = [path for path in arguments.runs if not path.is_dir()]
    runs = [run for path in tables for run in read_table(path, names)]
    folders = [read_folder(path) for path in arguments.runs if path.is_dir()]
    if arguments.loss != "auto" and not folders:
        rule = "chooses between losses of folders, and a table has one: name its column by --columns loss=..."
        raise ConfigError([Violation("--loss", arguments.loss, rule)])
    finished = [folder for folder in folders if folder.fault is None]
    notes = [f"{folder.name} is left out: {folder.fault}" for folder in folders if folder.fault is not None]
    more, said = _as_runs(finished, arguments.loss, not arguments.non_embedding)
    return runs + more, notes + (said if more else [])


def _as_runs(folders: Sequence[FolderRun], wanted: str, embeddings: bool) -> tuple[list[Run], list[str]]:
    """Return finished runs with the loss that is wanted, `auto` the better that all have, and what to say of it."""
    without = [folder.name for folder in folders if folder.validation_loss is None]
    if without and wanted == "validation":
        rule = f"needs an evaluation after the last step, and {', '.join(without[:6])} has none"
        raise ConfigError([Violation("--loss", wanted, rule, ("training",))])
    validation = not without and wanted != "training"
    kind = "the last evaluation" if validation else "the mean over the last twentieth of the steps"
    said = [f"loss: {kind}", *_say_texts(folders), *(_say_evaluations(folders) if validation else [])]
    return [folder.as_run(validation, embeddings) for folder in folders], said


def _say_texts(folders: Sequence[FolderRun]) -> list[str]:
    """Return that runs read different text, if they do: one law does not hold for it."""
    texts = sorted({folder.text for folder in folders})
    if len(texts) < 2:
        return []
    return [f"runs read different text, on which losses are not comparable: data.path={', '.join(texts[:3])}"]


def _say_evaluations(folders: Sequence[FolderRun]) -> list[str]:
    """Return why evaluations are hard to compare, if they are: of other text, or of little."""
    tokens = [folder.validation_tokens for folder in folders if folder.validation_tokens]
    cure = "telemetry.eval_batches x data.global_batch x data.seq_len"
    if tokens and max(tokens) > UNLIKE * min(tokens):
        return [f"evaluations are of {min(tokens):,} to {max(tokens):,} tokens, so not of one text: equal {cure}"]
    if tokens and min(tokens) < FEW_TOKENS:
        return [f"evaluations are of {min(tokens):,} tokens only, and depend on which: raise {cure}"]
    return []


def _columns(text: str) -> dict[str, str]:
    """Return what --columns says."""
    from dist_llm.planner.run_table import COLUMNS

    found = {}
    for pair in filter(None, text.split(",")):
        known, equals, column = pair.partition("=")
        if not equals or known not in COLUMNS:
            rule = "must be pairs such as params=N,loss=c4_en of what is wanted and what the table calls it"
            raise ConfigError([Violation("--columns", pair, rule, tuple(COLUMNS))])
        found[known] = column
    return found


def _choose(found: list[Run], arguments: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """Return the runs to fit and those to predict. Raises ConfigError where a pattern matches none."""
    patterns = [("--exclude", pattern) for pattern in arguments.exclude]
    patterns += [("--hold-out", pattern) for pattern in arguments.hold_out]
    unmatched = [
        Violation(option, pattern, "matches no run", tuple(run.name for run in found[:6]))
        for option, pattern in patterns
        if not any(fnmatchcase(run.name, pattern) for run in found)
    ]
    if not 0 <= arguments.exclude_worst <= len(found):
        unmatched.append(Violation("--exclude-worst", arguments.exclude_worst, f"must be from 0 to {len(found)}"))
    if unmatched:
        raise ConfigError(unmatched)
    worst = sorted(found, key=lambda run: -run.loss)[: arguments.exclude_worst]
    left = [run for run in found if run not in worst and not _matches(run, arguments.exclude)]
    held = [run for run in left if _matches(run, arguments.hold_out)]
    return [run for run in left if run not in held], held


def _matches(run: Run, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(run.name, pattern) for pattern in patterns)


def _describe(fitted: Fit, predictions: Sequence[Prediction]) -> dict[str, object]:
    """Return the fit as JSON holds it."""
    from dist_llm.planner.law_file import describe_fit

    largest = fitted.trust.flops[1]
    law = describe_fit(fitted).model_dump(mode="json", exclude={"resamples"})
    law["intervals"] = {name: fitted.constant_interval(name) for name in ("E", "A", "B", "alpha", "beta")}
    return {
        "law": law,
        "prior": None if fitted.prior is None else vars(fitted.prior),
        "num_runs": len(fitted.runs),
        "tested_reach": fitted.trust.largest_runs_reach if fitted.trust.largest_runs else None,
        "largest_runs": [_as_data(prediction) for prediction in fitted.trust.largest_runs],
        "runs": [
            vars(run) | {"flops": run.flops, "predicted": fitted.law.loss(run.num_params, run.tokens)}
            for run in fitted.runs
        ],
        "held_out": [_as_data(prediction) for prediction in predictions],
        "optimal": [vars(fitted.law.optimal(times * largest)) for times in FORESIGHT],
    }


def _as_data(prediction: Prediction) -> dict[str, object]:
    return {
        **vars(prediction.run),
        "flops": prediction.run.flops,
        "predicted": prediction.loss,
        "interval": prediction.interval,
        "error": prediction.error,
        "contained": prediction.contained,
    }


def _say(fitted: Fit, predictions: Sequence[Prediction]) -> list[str]:
    """Return the fit in words."""
    law, trust = fitted.law.constants, fitted.trust
    ranges = {"N": trust.num_params, "D": trust.tokens, "C": trust.flops}
    held = "" if fitted.prior is None else f"; exponents held near {fitted.prior.exponent} +- {fitted.prior.deviation}"
    lines = [
        f"{len(fitted.runs)} runs: "
        + ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in ranges.items()),
        f"L(N, D) = {law.E:.4f} + {law.A:.5g} / N^{law.alpha:.4f} + {law.B:.5g} / D^{law.beta:.4f} nats a token",
        "  " + ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in _intervals(fitted).items()),
        f"  Huber sum {fitted.huber_sum:.8f}, runs scatter by {fitted.law.scatter:.2%} about it{held}",
        f"a run predicted from all others is {trust.left_out_error:.2%} off",
    ]
    if count := len(trust.largest_runs):
        lines += [
            f"the {count} largest runs predicted from the rest are {trust.largest_runs_error:.2%} off, "
            f"at up to {trust.largest_runs_reach:.3g} times the compute",
            _say_trust(trust),
        ]
    else:
        lines.append("too few runs to fit some and predict larger ones: how far to trust it is not known")
    for prediction in predictions:
        low, high = prediction.interval
        reach = prediction.run.flops / trust.flops[1]
        lines.append(
            f"held out: {prediction.run.name}, {reach:.3g} times the largest fitted: {prediction.loss:.4f} "
            f"({low:.4f} to {high:.4f}), measured {prediction.run.loss:.4f}, {prediction.error:+.2%}"
            + ("" if prediction.contained else ", outside the interval")
        )
    return lines + [_say_optimum(times, fitted.law.optimal(times * trust.flops[1])) for times in FORESIGHT]


def _say_trust(trust: Trust) -> str:
    """Return how far the law may be trusted: as far as it was right where it was not fitted."""
    if trust.largest_runs_error > MOST_ERROR:
        return f"more than {MOST_ERROR:.0%} off beyond the runs that it was fitted to: trust it no further than them"
    reach = trust.flops[1] * trust.largest_runs_reach
    return f"trust it to about {reach:.2g} FLOPs; beyond, nothing here tests it"


def _intervals(fitted: Fit) -> dict[str, tuple[float, float]]:
    return {name: fitted.constant_interval(name) for name in ("E", "A", "B", "alpha", "beta")}


def _say_optimum(times: float, found: Optimum) -> str:
    assert found.num_params_interval is not None
    low, high = found.num_params_interval
    return (
        f"best use of {found.flops:.3g} FLOPs ({times:g} times the largest run): {found.num_params:.3g} parameters "
        f"({low:.2g} to {high:.2g}) on {found.tokens:.3g} tokens, loss {found.loss:.4f}"
    )


def _isoflop(runs: Sequence[Run]) -> tuple[dict[str, object], list[str]]:
    """Return approach 2's answer as data and in words."""
    from dist_llm.planner.isoflop import fit_power_law, fit_profiles

    profiles = fit_profiles(runs)
    law = fit_power_law(profiles)
    shown = [
        {"flops": each.flops, "num_params": each.num_params, "loss": each.loss, "inside": each.inside}
        for each in profiles
    ]
    lines = [
        f"IsoFLOP {each.flops:.3g}: best {each.num_params:.3g} parameters, loss {each.loss:.4f}"
        + ("" if each.inside else " (outside the sizes run: not used)")
        for each in profiles
    ]
    if law is None:
        lines.append("no power law: fewer than two budgets have four sizes around their best")
        return {"profiles": shown, "law": None}, lines
    assert law.exponent_interval is not None
    low, high = law.exponent_interval
    lines.append(f"N* = {law.coefficient:.4g} C^{law.exponent:.4f} ({low:.3f} to {high:.3f})")
    power = {"coefficient": law.coefficient, "exponent": law.exponent, "interval": law.exponent_interval}
    return {"profiles": shown, "law": power}, lines


def _write(arguments: argparse.Namespace, fitted: Fit, predictions: Sequence[Prediction]) -> list[str]:
    """Write the law and the picture where asked for, and say so."""
    from dist_llm.planner.law_file import render_law
    from dist_llm.telemetry.records import write_whole

    lines = []
    if arguments.write is not None:
        write_whole(arguments.write, render_law(fitted))
        lines.append(f"law written: {arguments.write}")
    if arguments.curves is not None:
        from dist_llm.planner.law_pictures import draw_fit

        write_whole(arguments.curves, draw_fit(fitted, predictions))
        lines.append(f"curves drawn: {arguments.curves}")
    return lines


FIT = Command("fit a scaling law to runs, and say how far it may be trusted", add_fit_arguments, fit)
