"""`dist-llm verify`: is this the same training on every layout and engine, after an interruption, at every width?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from dist_llm.cli.coordinates import COORDINATES
from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config
from dist_llm.errors import ConfigError, ExitCode, Violation

_CASES = """\
The layout that the config asks for is compared first, then those of a fixed list that the model permits: every axis,
schedule and ZeRO stage, each pair of them that is legal, and mixes of up to 16 ranks; or the 16 that tell most. A
layout's name begins with the model that it trains:
  as-given                  the model of the config (attention dropout taken as 0, experts as dropless,
                            fused accumulation as false but in bf16)
  untied, odd-vocabulary    it with embedding and head untied, or with a vocabulary that 2 does not divide
  gpt2, gpt2-untied         it in GPT-2's layout (learned positions, LayerNorm, GELU, biases, dropout 0.1)
  experts                   it with 4 experts a layer and a shared one: softmax, balance and z losses, moving biases
  experts-sigmoid           the same with sigmoid scores, balanced by the biases alone
accumulation is the number of microbatches in each rank's share of a batch. Where a layout differs, the report says
where first: step, phase (forward, gradient, update), parameter, axis, and the smallest layout that still differs."""


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, and which layouts to compare for how long."""
    parser.epilog = _CASES
    add_config(parser)
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp64", "bf16"),
        default="fp32",
        help="format to compare in: fp32 to 1e-5 (default), fp64 to 1e-9, bf16 to bounds of its own",
    )
    parser.add_argument("--fp64", action="store_true", help="the same as --precision fp64")
    parser.add_argument(
        "--set", choices=("quick", "all"), default="quick", help="the 16 layouts that tell most (default), or all"
    )
    parser.add_argument("--layouts", default="all", metavar="TEXT", help="only layouts, of all, with TEXT in the name")
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
            precision="fp64" if arguments.fp64 else arguments.precision,
            chosen=arguments.set,
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


_ENGINES = """\
Every engine that is installed and can train the model runs the same steps from the same weights and data, in fp32 on
CPU ranks of its own: in small layouts (data, tensor, sequence, pipeline, interleaved, context and expert parallel, ZeRO
1, 2 and 3) and in the config's, as far as its rules allow. Each is compared with the native engine in the same layout
(as-given in its name: the model of the config), which `verify layout` compares with one process: loss to 2e-5,
gradient norm to 1e-4 and weights to 1e-4, relative. Then each one's checkpoint of half way is resumed on each other
one, in the first layout that both can run, and what follows is held to the same bounds; --no-switch saves that time.
The optimizer's recipe is the config's: where warm-up is short, Adam's first steps turn
rounding into more than that."""


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, and which engines to compare in which layouts for how long."""
    parser.epilog = _ENGINES
    add_config(parser)
    parser.add_argument(
        "--engines",
        default="all",
        metavar="NAMES",
        help="a comma list of engines to compare with native, such as native,deepspeed (default: all)",
    )
    parser.add_argument(
        "--layouts", default="all", metavar="TEXT", help="only layouts with TEXT in the name: 'ranks=2 data=2 zero=1'"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps to train (default 20)")
    parser.add_argument("--no-switch", action="store_true", help="do not resume one engine's checkpoint on another")
    add_json(parser)


def engine(arguments: argparse.Namespace) -> Answer:
    """Train on every engine, and compare."""
    _require_steps(arguments.steps)
    config = load_config(compose_arguments(arguments), None)
    from dist_llm.train.engines import read_names
    from dist_llm.train.verify_engine import verify_engine

    return _answer(
        verify_engine(
            config,
            engines=read_names("--engines", arguments.engines),
            layouts=arguments.layouts,
            steps=arguments.steps,
            switch=not arguments.no_switch,
            report=_reporter(arguments),
        )
    )


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
            lines.extend(
                ["", *_table([{key: cell for key, cell in row.items() if key != _FIRST} for row in value]), ""]
            )
            lines.extend(_first_divergence(row["layout"], row[_FIRST]) for row in value if row.get(_FIRST))
        elif name != "ok":
            lines.append(f"{_words(name)}: {_shown(value)}")
    return "\n".join([*lines, "equal" if facts.get("ok") is True else "NOT EQUAL"])


def _first_divergence(layout: object, found: Mapping[str, object]) -> str:
    """Return where a layout first differs, in a sentence."""
    return (
        f"{layout}: first differs at step {found['step']} in the {found['phase']}, {found['parameter']} "
        f"({_shown(found['gap'])}; {found['differing']} beyond the bound), over {found['axis']} ({found['evidence']}); "
        f"the smallest layout that differs: {_shown(found['smallest_layout'])}"
    )


def _table(rows: list[Mapping[str, object]]) -> list[str]:
    """Return rows of the same keys as aligned lines under a heading."""
    cells = (
        [[_words(key) for key in rows[0]], *([_shown(cell) for cell in row.values()] for row in rows)] if rows else []
    )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


_FIRST = "first_divergence"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: object) -> str:
    """Return a value of a report: differences to two digits, a list as its words, truth as yes or no, - for nothing."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.2g}" if isinstance(value, float) else str("" if value is None else value) or "-"


COMMANDS = {
    "layout": Command("train in one process and in many layouts, and compare", add_layout_arguments, layout),
    "resume": Command("stop, resume, and compare with the run that was never stopped", add_resume_arguments, resume),
    "engine": Command("train on every engine that is installed, and compare", add_engine_arguments, engine),
    "coordinates": COORDINATES,
}
