"""One run, one writer: an advisory lock on the run folder, held as long as the process that took it lives."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from dist_llm.errors import StorageError
from dist_llm.types import RUN_LOCK


def lock_run(run_dir: Path) -> IO[bytes]:
    """Lock the run folder, made where absent; return the open lock file. StorageError when another run holds it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / RUN_LOCK).open("ab")
    except OSError as error:
        raise StorageError(f"run.dir: cannot write in {run_dir}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise StorageError(
            f"{run_dir} is being written by another run; choose another run.name or end that run"
        ) from error
    return file
