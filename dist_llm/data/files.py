"""Careful file access for the data layer: regular files only, the operating system's refusals as StorageError.

A FIFO, device or socket given as data would block or never end, so it is refused before it is opened.
What is written here is flushed to the disk before the call returns, so that a rename can publish it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dist_llm.errors import ConfigError, StorageError, Violation

BLOCK_BYTES = 1 << 20

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def display(path: Path | str) -> str:
    """Return a path as printable text; bytes of the name that are not UTF-8 are shown escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def storage_errors(action: str, path: Path | str) -> Iterator[None]:
    """Turn an OSError raised inside into a StorageError that says what could not be done to which path."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {action} {display(path)}: {error.strerror or error}") from error


def user_path(key: str, value: str) -> Path:
    """Return a setting's path, `~` expanded and absolute. Raises ConfigError where it is no path, StorageError."""
    if not value.strip() or "\0" in value:
        raise ConfigError([Violation(key, repr(value), "must name a file or folder")])
    try:
        with storage_errors("find", value):
            return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError([Violation(key, value, f"cannot be expanded: {error}")]) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises StorageError where it is missing, unreadable or of another kind."""
    with storage_errors("read", path):
        _require_regular(path, path.stat())
        # Without O_NONBLOCK a FIFO that takes the file's place after the check would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _require_regular(path, os.fstat(descriptor))
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise


def _require_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "not a regular file")
    raise StorageError(f"cannot read {display(path)}: it is {kind}; a regular file is needed")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file as 64 hex digits. Raises StorageError."""
    digest = hashlib.sha256()
    with open_regular(path) as file, storage_errors("read", path):
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk. Raises StorageError, also when the file is already there."""
    with storage_errors("write", path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk. Raises StorageError."""
    with storage_errors("flush", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
