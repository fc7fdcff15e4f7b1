"""Logs of a rank: rank 0 says what happens, the others only what is wrong, each line under its rank's number."""

from __future__ import annotations

import logging
import sys

_ROOT = "dist_llm"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this package (pass `__name__`); a foreign name goes under `dist_llm`."""
    inside = name == _ROOT or name.startswith(_ROOT + ".")
    return logging.getLogger(name if inside else f"{_ROOT}.{name}")


def configure_logging(rank: int, debug: bool = False, to_stderr: bool = True) -> None:
    """Print the package's logs on stderr (or stdout): info from rank 0, warnings from every rank, all with `debug`.

    Calling it again replaces what was configured before.
    """
    logger = logging.getLogger(_ROOT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    handler = _ToCurrentStream("stderr" if to_stderr else "stdout")
    prefix = "" if rank == 0 else f"[rank {rank}] "
    origin = "%(asctime)s %(name)s: " if debug else ""
    handler.setFormatter(logging.Formatter(f"{prefix}{origin}%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


def adopt_logger(name: str) -> None:
    """Let the errors of a library go to this package's log, under its logger `name`, and drop its warnings."""
    theirs = logging.getLogger(name)
    theirs.handlers = []
    theirs.setLevel(logging.ERROR)
    theirs.parent, theirs.propagate = logging.getLogger(_ROOT), True


class _ToCurrentStream(logging.Handler):
    """Writes to whatever sys.stderr or sys.stdout is now: a live line on the terminal puts itself in their place."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._stream = name

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if self._stream == "stderr" else sys.stdout
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except Exception:
            self.handleError(record)
