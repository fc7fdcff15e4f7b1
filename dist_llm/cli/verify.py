"""`dist-llm verify`: is this config the same training on every layout, after an interruption, and at every width?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from dist_llm.cli.coordinates import COORDINATES
from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config
from dist_llm.errors import ConfigError, ExitCode, Violation

_CASES = """\
The layout that the config asks for is compared first, then each of a fixed list that the model permits: every axis,
schedule and ZeRO stage alone, and mixes of up to 8 ranks. A layout's name begins with the model that it trains:
  as-given                  the model of the config (attention dropout taken as 0)
  untied, odd-vocabulary    it with embedding and head untied, or with a vocabulary that 2 does not divide
  gpt2, gpt2-untied         it in GPT-2's layout (learned positions, LayerNorm, GELU, biases, dropout 0.1)
accumulation is the number of microbatches in each rank's share of a batch."""


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, and which layouts to compare for how long."""
    parser.epilog = _CASES
    add_config(parser)
    parser.add_argument("--fp64", action="store_true", help="in double precision, to 1e-9 (default: fp32, to 1e-5)")
    parser.add_argument("--layouts", default="all", metavar="TEXT", help="only layouts whose name contains TEXT")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps to train (default 20)")
    add_json(parser)


def layout(arguments: argparse.Namespace) -> Answer:
    """Train in one process and in many layouts, and compare."""
    _require_steps(arguments.steps)
    config = load_config(compose_arguments(arguments), None)
    from dist_llm.train.verify import verify_layout

    return _answer(
        verify_layout(
            config,
            fp64=arguments.fp64,
            layouts=arguments.layouts,
            steps=arguments.steps,
            report=_reporter(arguments),
        )
    )


def add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, and how long to train."""
    add_config(parser)
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps of the uninterrupted run (default 8)")
    add_json(parser)


def resume(arguments: argparse.Namespace) -> Answer:
    """Stop and resume, and compare with the run that was never stopped."""
    _require_steps(arguments.steps)
    config = load_config(compose_arguments(arguments), None)
    from dist_llm.train.verify_resume import verify_resume

    return _answer(verify_resume(config, steps=arguments.steps, report=_reporter(arguments)))


def _require_steps(steps: int) -> None:
    """Refuse a number of steps that proves nothing."""
    if not 1 <= steps <= 10**6:
        raise ConfigError([Violation("--steps", steps, "must be from 1 to 1000000")])


def _reporter(arguments: argparse.Namespace) -> Callable[[str], None]:
    """Return what prints progress on stderr."""
    from dist_llm.runtime.log import configure_logging, get_logger

    configure_logging(0, arguments.debug)
    return get_logger("cli.verify").info


def _answer(facts: Mapping[str, object]) -> Answer:
    """Return what was found; numerics (76) when it is not equal."""
    equal = facts.get("ok") is True
    return Answer(_describe(facts), facts, ExitCode.DONE if equal else ExitCode.NUMERICS)


def _describe(facts: Mapping[str, object]) -> str:
    """Return facts as lines: values, then tables of rows, then what was left out, then the verdict."""
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines.extend(
                f"{_words(name)}: {key if '.' in key else _words(key)} {_shown(cell)}" for key, cell in value.items()
            )
        elif isinstance(value, list):
            lines.extend(["", *_table(value), ""])
        elif name != "ok":
            lines.append(f"{_words(name)}: {_shown(value)}")
    return "\n".join([*lines, "equal" if facts.get("ok") is True else "NOT EQUAL"])


def _table(rows: list[Mapping[str, object]]) -> list[str]:
    """Return rows of the same keys as aligned lines under a heading."""
    cells = (
        [[_words(key) for key in rows[0]], *([_shown(cell) for cell in row.values()] for row in rows)] if rows else []
    )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _words(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: object) -> str:
    """Return a value of a report: differences to two digits, a list as its words, truth as yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.2g}" if isinstance(value, float) else str(value) or "-"


COMMANDS = {
    "layout": Command("train in one process and in many layouts, and compare", add_layout_arguments, layout),
    "resume": Command("stop, resume, and compare with the run that was never stopped", add_resume_arguments, resume),
    "coordinates": COORDINATES,
}
