"""A folder that is made once: built in private under a lock, published whole by one rename, reused ever after.

    <cache>/<name>             published: complete, never written into again
    <cache>/<name>.tmp-<id>    being built; a leftover of a killed builder is removed by the next one
    <cache>/<name>.lock        held (flock) while building; the kernel releases it when the holder dies

Invariant: whoever sees <cache>/<name> sees all of it, whenever its builder was killed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dist_llm.data.files import display, storage_errors, sync_directory
from dist_llm.errors import StorageError

Report = Callable[[str], None]
"""Called with one line that says what is being done."""

_POLL_SECONDS = 0.1
_REMIND_SECONDS = 30.0


def build_once(folder: Path, build: Callable[[Path], None], report: Report) -> None:
    """Make `folder` by `build(private folder)` unless it is there; wait while another process makes it.

    `build` flushes the files that it writes. Raises what `build` raises, leaving nothing behind, and StorageError.
    """
    if folder.is_dir():
        return
    with storage_errors("make data.cache_dir", folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(folder.name + ".lock"), report):
        if folder.is_dir():
            return
        for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        private = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(8)}")
        with storage_errors("make", private):
            private.mkdir()
        try:
            build(private)
            sync_directory(private)
            with storage_errors("publish", folder):
                private.rename(folder)
            sync_directory(folder.parent)
        finally:
            shutil.rmtree(private, ignore_errors=True)


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """Hold an exclusive lock on `path` while inside; say whom it waits for. The file stays: removing it would race."""
    with storage_errors("lock", path):
        file = path.open("a+")
    with file:
        reminded = -_REMIND_SECONDS
        while not _try_lock(file, path):
            if time.monotonic() - reminded >= _REMIND_SECONDS:
                file.seek(0)
                report(f"waiting for {file.read().strip() or 'another process'}, which is preparing the same data")
                reminded = time.monotonic()
            time.sleep(_POLL_SECONDS)
        with storage_errors("write", path):
            file.truncate(0)
            # Past the file's buffer, which would try again when the file is closed, and fail without its name.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _try_lock(file: TextIO, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(f"cannot lock {display(path)}: {error.strerror}; put data.cache_dir elsewhere") from error
    return True
