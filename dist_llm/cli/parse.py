"""The shape of a command: its arguments, what it runs, and what it answers. No pydantic, Hydra or torch at import."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dist_llm.cli.say import say_on_stdout
from dist_llm.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dist_llm.cli.compose import Composed
    from dist_llm.config.run import RunConfig


@dataclass(frozen=True)
class Answer:
    """What a command has to say: `text` for a person or `data` under --json, and its exit code.

    is_json: whether the text is JSON by lines, with --json or without.
    """

    text: str = ""
    data: Mapping[str, object] | None = None
    code: int = ExitCode.DONE
    is_json: bool = False


@dataclass(frozen=True)
class Command:
    """A command: one line on what it does, the arguments it takes, the function it is, and whether a scheduler that
    ends it by a signal may requeue it.
    """

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Answer]
    preemptible: bool = False


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors as config errors (exit code 78, no traceback) and guesses no abbreviation."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=layout, allow_abbrev=False)

    def print_help(self, file: object = None) -> NoReturn:
        """Print what the command takes, and end."""
        raise SystemExit(say_on_stdout(self.format_help().rstrip("\n"), ExitCode.DONE, "dist-llm"))

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        hint = ""
        if message.startswith("unrecognized arguments"):
            hint = " (settings are written key=value without dashes, such as run.steps=100)"
        raise ConfigError(f"{message}{hint}; see {self.prog} --help")


def parse_arguments(command: Command, prog: str, words: list[str]) -> argparse.Namespace:
    """Return the parsed arguments of a command. Raises ConfigError; SystemExit after printing --help."""
    parser = Parser(prog, command.summary)
    parser.add_argument("--debug", action="store_true", help="log more, and show the traceback of an error")
    parser.set_defaults(as_json=False, speaker="dist-llm", follows=False)
    command.arguments(parser)
    return parser.parse_intermixed_args(words)


def add_json(parser: argparse.ArgumentParser, option: str | None = None) -> None:
    """Take --json (only together with `option`, if given): stdout is then the JSON alone, and logs go to stderr."""
    words = "print one JSON object on stdout, logs on stderr"
    words = f"with {option}: {words}" if option else words
    parser.add_argument("--json", dest="as_json", action="store_true", help=words)


def require_with_json(arguments: argparse.Namespace, option: str, given: bool) -> None:
    """Refuse --json where the command has nothing to report but under `option`."""
    if arguments.as_json and not given:
        raise ConfigError(f"--json goes with {option}: without it nothing is reported but files of the run")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Take a config: overrides, and a config file in place of the presets."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="a preset (model=llama-tiny, experiment=quickstart) or a setting (run.steps=500); "
        "`dist-llm config presets` lists the presets",
    )
    parser.add_argument(
        "--config",
        dest="config_file",
        type=Path,
        metavar="FILE",
        help="a config file such as runs/<name>/config.yaml in place of the presets; overrides apply on top",
    )


def compose_arguments(arguments: argparse.Namespace) -> Composed:
    """Return what the arguments compose to, with what is wrong with them."""
    from dist_llm.cli.compose import compose_partly

    return compose_partly(arguments.overrides, arguments.config_file)


def load_config(composed: Composed, world_size: int | None) -> RunConfig:
    """Return the composed config if it can run on `world_size` ranks (None: not known yet).

    Raises ConfigError with every violation at once, LayoutError when only the number of ranks does not fit.
    """
    from dist_llm.config.checks import decode_and_check

    return decode_and_check(composed.tree, world_size, composed.violations, frozenset(composed.unusable))
