"""`dist-llm doctor`: is this machine, node or allocation fit to train, and what would mend it?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments
from dist_llm.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dist_llm.launcher.preflight import Finding

_DOCTOR = """\
A line for each thing that training uses: ok, missing (the note says what brings it) or wrong (it is not what its name
says, or of no use here; the note says why). Only what the config needs decides: 0 when it can train here, 78 when not.
  dist-llm doctor                        can the default config train here, with our own engine?
  dist-llm doctor engine=megatron        can Megatron-Core?
  dist-llm doctor --config runs/x/config.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config."""
    parser.epilog = _DOCTOR
    add_config(parser)
    add_json(parser)


def main(arguments: argparse.Namespace) -> Answer:
    """Examine this machine for the config."""
    from dist_llm.config.checks import check
    from dist_llm.config.decode import decode_partly
    from dist_llm.launcher.preflight import examine

    composed = compose_arguments(arguments)
    decoded = decode_partly(composed.tree)
    config = decoded.config
    if problems := [*composed.violations, *decoded.violations]:
        raise ConfigError([*problems, *check(config, None, decoded.unusable | composed.unusable)])
    found = examine(config)
    fit = not any(finding.stops for finding in found)
    data: dict[str, object] = {
        "ok": fit,
        "engine": config.engine.name,
        "checks": [{**asdict(finding), "stops": finding.stops} for finding in found],
    }
    text = "\n".join([*_table(found), "", *_verdict(config.engine.name, found)])
    return Answer(text, data, ExitCode.DONE if fit else ExitCode.CONFIG)


def _table(found: Sequence[Finding]) -> list[str]:
    """Return a line for each finding, in columns."""
    rows = [("check", "status", "version", "note")]
    rows += [(finding.name, finding.status, finding.version or "", finding.note) for finding in found]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(3)), row[3]]).rstrip() for row in rows]


def _verdict(engine: str, found: Sequence[Finding]) -> list[str]:
    """Return whether the config can train here, and what to do where it cannot."""
    stopping = [finding for finding in found if finding.stops]
    if not stopping:
        return [f"this machine is fit to train with engine={engine}"]
    lines = [f"  {finding.name} is {finding.status}: {finding.note}" for finding in stopping]
    return [f"this machine is not fit to train with engine={engine}:", *lines]


DOCTOR = Command("is this machine fit to train? what is here, missing or wrong", add_arguments, main)
