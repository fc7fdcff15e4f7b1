"""`dist-llm report`: a run's figures, and what was foretold of them, as text, JSON and one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_llm.cli.parse import Answer, Command, add_json
from dist_llm.errors import ConfigError, Violation

_EPILOG = """\
Works while a run trains as well as after. The page is RUN/report.html and needs no other file: figures, loss curve,
sample, events, config. Foretold are step time and memory of rank 0, and the loss where the law says less than a guess
has (not of tiny models): prediction.json, written as the run began."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the folder of a run."""
    parser.epilog = _EPILOG
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run, such as runs/quickstart")
    add_json(parser)


def main(arguments: argparse.Namespace) -> Answer:
    """Write the page, and say where it is and what is on it."""
    from dist_llm.telemetry.records import CONFIG_FILE
    from dist_llm.telemetry.report import compare_foretold, run_figures, write_report

    folder: Path = arguments.run_dir
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError([Violation("RUN", str(folder), f"holds no {CONFIG_FILE}: it is not the folder of a run")])
    page = write_report(folder)
    figures, foretold = run_figures(folder), compare_foretold(folder)
    lines = [f"  {figure.label:<18} {figure.value} {figure.unit}".rstrip() for figure in figures]
    data: dict[str, object] = {
        "report": str(page),
        "figures": {figure.label: f"{figure.value} {figure.unit}".strip() for figure in figures},
        "foretold": {
            name: {"foretold": each.foretold, "measured": each.measured, "error": each.error}
            for name, each in foretold.items()
        },
    }
    return Answer("\n".join([*lines, f"report: {page}"]), data)


REPORT = Command("a run's figures, and predicted beside measured, as one HTML page", add_arguments, main)
