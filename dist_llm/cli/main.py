"""`dist-llm`: find the command, parse its arguments, run it, exit. `--help` loads nothing that takes time."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from dist_llm import __version__
from dist_llm.cli import bench, checkpoint, config, data, doctor, generate, launch, plan, report, train, verify
from dist_llm.cli.exit import execute, preemptible, report_error
from dist_llm.cli.parse import Command, parse_arguments
from dist_llm.cli.say import drop_unwritable_streams, say_on_stdout
from dist_llm.errors import ConfigError, DistLLMError, ExitCode

Group = Mapping[str, Command]
DEFAULT = ""
"""Name, in a group, of the command that its name alone is: `dist-llm plan budget.flops=1e22`."""

COMMANDS: Mapping[str, Command | Group] = {
    "train": train.TRAIN,
    "launch": launch.LAUNCH,
    "verify": verify.COMMANDS,
    "data": data.COMMANDS,
    "checkpoint": checkpoint.COMMANDS,
    "generate": generate.GENERATE,
    "report": report.REPORT,
    "plan": plan.COMMANDS,
    "bench": bench.COMMANDS,
    "config": config.COMMANDS,
    "doctor": doctor.DOCTOR,
}

_HEAD = "dist-llm: pretrain GPT and Llama models on GPUs or CPU ranks; every layout trains the same model"
_FOOT = """\
dist-llm COMMAND --help describes a command. Any setting can be overridden: key=value, as in
  dist-llm launch experiment=quickstart
  dist-llm train model=llama-tiny run.steps=500 optimizer.lr=1e-3
exit codes: 0 done, 65 data or checkpoint damaged, 69 a peer was lost (retry), 70 our bug, 74 I/O,
  75 preempted (requeue), 76 numerics, 78 config, 130 Ctrl-C with nothing to save"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: this process's) and return its exit code."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    finally:
        drop_unwritable_streams()


def _run(words: list[str]) -> int:
    try:
        found = _find(words)
        if isinstance(found, str):
            return say_on_stdout(found, ExitCode.DONE, "dist-llm")
        command, prog, rest = found
        arguments = parse_arguments(command, prog, rest)
    except DistLLMError as error:
        return report_error(error, "dist-llm", debug=False, as_json="--json" in words)
    except SystemExit as stop:
        return int(stop.code or 0)
    with preemptible(arguments) if command.preemptible else nullcontext():
        return execute(command.run, arguments)


def _find(words: list[str]) -> tuple[Command, str, list[str]] | str:
    """Return the command that `words` name, its name, and the words after it; or the help that was asked for."""
    node: Command | Mapping[str, Command | Group] | Group = COMMANDS
    for index, word in enumerate(words):
        prog = " ".join(["dist-llm", *words[:index]])
        if isinstance(node, Command):
            return node, prog, words[index:]
        if word in ("-h", "--help") and DEFAULT not in node:
            return _help(prog, node)
        if word == "--version" and index == 0:
            return f"dist-llm {__version__}"
        if DEFAULT in node and ("=" in word or word.startswith("-")):
            node = node[DEFAULT]
            assert isinstance(node, Command)
            return node, prog, words[index:]
        if word not in node:
            near = difflib.get_close_matches(word, node, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; use one of {', '.join(node)}"
            raise ConfigError(f"{word!r} is not a command of {prog}{hint}")
        node = node[word]
    node = node.get(DEFAULT, node) if not isinstance(node, Command) else node
    if isinstance(node, Command):
        return node, " ".join(["dist-llm", *words]), []
    prog = " ".join(["dist-llm", *words])
    raise ConfigError(f"a command is missing\n{_help(prog, node)}")


def _help(prog: str, node: Mapping[str, Command | Group] | Group) -> str:
    """Return what can follow `prog`, one command a line."""
    lines = [_HEAD, "", f"usage: {prog} COMMAND ...", "", "commands:"]
    for name, entry in node.items():
        if isinstance(entry, Command):
            lines.append(f"  {name:<22}{entry.summary}")
        else:
            lines.extend(f"  {f'{name} {leaf}'.strip():<22}{command.summary}" for leaf, command in entry.items())
    return "\n".join([*lines, "", _FOOT])
