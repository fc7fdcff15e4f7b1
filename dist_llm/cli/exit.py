"""From an answer or an exception to what is printed and the exit code that job scripts act on.

A user's mistake never ends in a traceback (--debug shows it); our own bug always does, since it is what we need to see.
An error that all ranks share is printed by the first rank of each node alone.
Under --json stdout is one JSON object whatever happens: the answer, or {"ok": false, "error": ..., "violations": ...}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from dist_llm.cli.parse import Answer
from dist_llm.cli.say import say_on_stderr, say_on_stdout
from dist_llm.errors import INTERRUPTED, ConfigError, DistLLMError, ExitCode, exit_code_of


@contextlib.contextmanager
def preemptible(arguments: argparse.Namespace) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end this process at once with 75: it has nothing to save, and the job may come back.

    Training and the launcher put their own handlers over these while they have something to end in good order.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        try:
            if not arguments.follows:
                name, code = signal.Signals(number).name, int(ExitCode.PREEMPTED)
                # Not print: the signal may have come in the middle of one.
                os.write(2, f"{arguments.speaker}: {name} with nothing to save (exit code {code}: requeue)\n".encode())
        finally:
            os._exit(ExitCode.PREEMPTED)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def execute(run: Callable[[argparse.Namespace], Answer], arguments: argparse.Namespace) -> int:
    """Run a command, print its answer or its error, and return the exit code."""
    try:
        with contextlib.redirect_stdout(sys.stderr) if arguments.as_json else contextlib.nullcontext():
            answer = run(arguments)
    except KeyboardInterrupt:
        say_on_stderr(f"{arguments.speaker}: interrupted")
        return INTERRUPTED
    except Exception as error:
        if arguments.follows and _is_said_elsewhere(error):
            return exit_code(error)
        return report_error(error, arguments.speaker, arguments.debug, arguments.as_json)
    text = answer.text
    if arguments.as_json and not answer.is_json:
        text = _json(answer.data or {"ok": answer.code == ExitCode.DONE})
    return say_on_stdout(text, int(answer.code), arguments.speaker)


def _json(facts: Mapping[str, object]) -> str:
    """Return facts as JSON, a row of a list on a line: there may be many, and Python indents slowly."""
    lines = []
    for name, value in facts.items():
        text = json.dumps(value, indent=2, allow_nan=False) if not isinstance(value, list) else _rows(value)
        lines.append(f"{json.dumps(name)}: {text}".replace("\n", "\n  "))
    return "{\n  " + ",\n  ".join(lines) + "\n}"


def _rows(rows: list[object]) -> str:
    return "[\n  " + ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]" if rows else "[]"


def report_error(error: Exception, speaker: str, debug: bool, as_json: bool) -> int:
    """Print an error as a person or a program needs it and return its exit code."""
    code = exit_code(error)
    message = _message(error, code)
    if debug or code == ExitCode.BUG:
        say_on_stderr("".join(traceback.format_exception(error)).rstrip())
    say_on_stderr(f"{speaker}: {message}")
    if as_json:
        facts: dict[str, object] = {"ok": False, "exit_code": int(code), "error": message}
        if isinstance(error, ConfigError):
            facts["violations"] = [
                {"key": v.key, "value": _finite(v.value), "rule": v.rule, "legal": list(v.legal)}
                for v in error.violations
            ]
        return say_on_stdout(json.dumps(facts, indent=2, default=str), int(code), speaker)
    return int(code)


def _finite(value: object) -> object:
    """Return a value, as text where JSON has no number for it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_said_elsewhere(error: Exception) -> bool:
    """Say whether the node's first rank prints this error too; what a bug did here is to be seen here."""
    own_bug = exit_code(error) == ExitCode.BUG and error.__cause__ is not None
    return isinstance(error, DistLLMError) and error.shared and not own_bug


def exit_code(error: Exception) -> int:
    """Return the exit code of an error. Without torch there are no peers, and asking for them would load it."""
    if "torch" not in sys.modules:
        return exit_code_of(error, lambda error: False)
    from dist_llm.runtime.process import is_peer_loss

    return exit_code_of(error, is_peer_loss)


def _message(error: Exception, code: int) -> str:
    """Return what went wrong in words, with the notes that were added on the way."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and not isinstance(error, DistLLMError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if code == ExitCode.BUG:
        text = f"this is a bug in dist_llm, please report it: {type(error).__name__}: {text}"
    if code == ExitCode.PEER_LOST and not isinstance(error, DistLLMError):
        text = f"another rank went away, the job may be retried: {text}"
    return "\n".join([text, *getattr(error, "__notes__", [])])
