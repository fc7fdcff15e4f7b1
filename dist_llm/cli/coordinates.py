"""`dist-llm verify coordinates`: does muP keep what layers do the same at every width?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config
from dist_llm.errors import ConfigError, ExitCode, StorageError, Violation

_ABOUT = """\
The model of the config is trained for a few steps at several widths, in one process, on one batch of random tokens
(data.microbatch sequences of data.seq_len, at optimizer.lr): once under muP and, for contrast, once under the standard
parametrisation. Of each kind of layer the report gives the size of its outputs and their change since the start, and
how both go with the width: the slope of log against log. Under muP no size and no change may grow with the width, and
no change may vanish. Sizes may fall: logits start smaller in wider models, and catch up.

The base model is that of model.mup.base_width, or as wide as the first width. All that is a width goes in proportion:
by more heads, or under --wider-heads by wider ones, which is when attention is scaled by 1 / head width.

example: dist-llm verify coordinates model=llama-tiny data.seq_len=64 --picture coordinates.png"""

_WIDEST = 2**16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, which widths to train for how long, and what to draw."""
    parser.epilog = _ABOUT
    add_config(parser)
    parser.add_argument("--widths", metavar="N,N,...", help="values of model.hidden_size (default: four from 64 on)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps to train at each width (default 10)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds to take the mean of (default 1)")
    parser.add_argument("--wider-heads", action="store_true", help="keep the number of heads, not their width")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the changes as FILE (.png or .svg)")
    add_json(parser)


def coordinates(arguments: argparse.Namespace) -> Answer:
    """Train at several widths, and compare what layers put out."""
    widths = _required(arguments)
    config = load_config(compose_arguments(arguments), None)
    from dist_llm.runtime.log import configure_logging, get_logger
    from dist_llm.telemetry.coordinates import draw_coordinates
    from dist_llm.train.coordinates import Widths, verify_coordinates

    path: Path | None = arguments.picture
    if path is not None and not path.parent.is_dir():
        raise StorageError(f"cannot write {path}: there is no folder {path.parent}")
    configure_logging(0, arguments.debug)
    log = get_logger("cli.verify")
    chosen = Widths.choose(config.model, widths, arguments.wider_heads)
    facts = verify_coordinates(config, chosen, steps=arguments.steps, seeds=arguments.seeds, report=log.info)
    if path is not None:
        try:
            path.write_bytes(draw_coordinates(facts, path))
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
    facts["picture"] = None if path is None else str(path)
    return Answer(_describe(facts), facts, ExitCode.DONE if facts["ok"] is True else ExitCode.NUMERICS)


def _required(arguments: argparse.Namespace) -> tuple[int, ...] | None:
    """Return the widths that were asked for, None for the usual ones. Raises ConfigError with all that is wrong."""
    violations = []
    if arguments.picture is not None and arguments.picture.suffix not in (".png", ".svg"):
        violations.append(Violation("--picture", arguments.picture, "must end with .png or .svg"))
    for option, most in (("steps", 1000), ("seeds", 100)):
        value = getattr(arguments, option)
        if not 1 <= value <= most:
            violations.append(Violation(f"--{option}", value, f"must be from 1 to {most}"))
    words: list[str] | None = None if arguments.widths is None else arguments.widths.split(",")
    widths = tuple(int(word) for word in words or () if word.isascii() and word.isdecimal())
    rising = all(1 <= a < b <= _WIDEST for a, b in pairwise(widths))
    if words is not None and (len(widths) != len(words) or len(widths) < 2 or not rising):
        rule = f"must be two or more whole numbers, each larger than the one before, up to {_WIDEST}"
        violations.append(Violation("--widths", arguments.widths, rule, ("64,128,256,512",)))
    if violations:
        raise ConfigError(violations)
    return None if words is None else widths


def _describe(facts: Mapping[str, Any]) -> str:
    """Return a table of slopes, the picture's name and the verdict."""
    bounds = facts["bounds"]
    lines = [
        f"base width: {facts['base_width']}",
        f"widths: {', '.join(str(width) for width in sorted({row['width'] for row in facts['figures']}))}",
        f"steps: {facts['steps']}",
        f"learning rate: {facts['lr']:g}",
        f"bounds on slopes under muP: growth {bounds['growth']:g}, fall of a change {bounds['fall']['logits']:g}",
        "",
        f"{'slope after the last step':<26}{'muP':<24}standard",
        f"{'':<26}{'size':>6}{'change':>8}{'':10}{'size':>6}{'change':>8}",
    ]
    for row in facts["kinds"]:
        verdict = "ok" if row["ok"] else "OFF"
        slopes = [row[f"{name}_{part}"] for name in ("mup", "standard") for part in ("size", "change")]
        size, change, other_size, other_change = ("-" if value is None else f"{value:+.2f}" for value in slopes)
        ours = f"{size:>6}{change:>8}  {verdict:<8}"
        lines.append(f"{row['kind'].replace('_', ' '):<26}{ours}{other_size:>6}{other_change:>8}")
    lines.append("")
    if facts["picture"] is not None:
        lines.append(f"picture: {facts['picture']}")
    lines.append("muP holds" if facts["ok"] else "muP does NOT hold")
    return "\n".join(lines)


COORDINATES = Command("train at several widths under muP, and compare what layers put out", add_arguments, coordinates)
