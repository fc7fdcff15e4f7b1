"""Words for streams that may be full, closed or gone: what cannot be said does not change how a command ends."""

from __future__ import annotations

import contextlib
import sys

from dist_llm.errors import ExitCode


def say_on_stderr(text: str) -> None:
    """Print on stderr, if there is one, whatever characters it can show."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(_encodable(text, sys.stderr.encoding), file=sys.stderr, flush=True)


def say_on_stdout(text: str | None, code: int, speaker: str) -> int:
    """Print on stdout, if there is one, and return `code`, or 74 where all was done but this.

    A reader that went away (`| head`) is no error.
    """
    if not text or sys.stdout is None:
        return code
    try:
        print(_encodable(text, sys.stdout.encoding), flush=True)
    except BrokenPipeError:
        return code
    except OSError as error:
        say_on_stderr(f"{speaker}: cannot write to stdout: {error.strerror}")
        return code or int(ExitCode.IO)
    return code


def drop_unwritable_streams() -> None:
    """Forget what cannot be flushed: the interpreter would flush it again at its end, fail, and exit with 120."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            setattr(sys, name, None)


def _encodable(text: str, encoding: str | None) -> str:
    """Return text with what the stream cannot encode written as escapes."""
    name = encoding or "utf-8"
    return text.encode(name, "backslashreplace").decode(name)
