"""Files and directories of checkpoints: safe to open, durable to write, published by one rename. No torch.

    root/step-00000100             committed: a name that only `publish` gives
    root/step-00000100.tmp-<id>    being written, or being removed: anybody may delete it
    root/step-00000100.damaged-<id>  a damaged one that a new save of the same step put aside

Source: write, fsync file, fsync directory, rename, fsync parent (FAULTS 4.4). Invariant: reads follow no link, open
no device or pipe, and refuse a file whose size is not the expected one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_llm.errors import CheckpointError, DistLLMError, StorageError

_STEP = re.compile(r"step-([0-9]{8,18})\Z")
_LEFTOVER = re.compile(r"step-[0-9]{8,18}\.tmp-[0-9a-f]{32}\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO, errno.EIO}
"""Errors on reading that say that the checkpoint itself is not whole; others say that the system refused."""

MAX_STEP = 10**18 - 1


def step_directory(root: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is committed."""
    return root / f"step-{step:08d}"


def staging_directory(root: Path, step: int, save_id: str) -> Path:
    """Return where the checkpoint of `step` is written before it is published."""
    return root / f"step-{step:08d}.tmp-{save_id}"


def new_save_id() -> str:
    """Return 128 random bits in hexadecimal."""
    return secrets.token_hex(16)


def step_of(path: Path) -> int | None:
    """Return the step that a directory's name says; None when it is not the name of a committed checkpoint."""
    match = _STEP.match(path.name)
    return int(match[1]) if match and path.name == f"step-{int(match[1]):08d}" else None


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of what is committed under `root` by name, newest first; links are not followed."""
    found = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                step = step_of(root / entry.name)
                if step is not None and entry.is_dir(follow_symlinks=False):
                    found.append((step, root / entry.name))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise storage_error("list", root, exc) from exc
    return sorted(found, reverse=True)


def storage_error(action: str, path: Path, exc: OSError) -> StorageError:
    """Return the error for an operating system's refusal, naming what was tried on which path."""
    return StorageError(f"cannot {action} {path}: {exc.strerror or exc}")


def read_error(path: Path, exc: OSError) -> DistLLMError:
    """Return CheckpointError when a failed read means damage (missing, a link, a bad block), StorageError otherwise."""
    if exc.errno in _DAMAGE:
        return CheckpointError(f"checkpoint file {path} cannot be read: {exc.strerror}")
    return storage_error("read", path, exc)


class FileReader:
    """A regular file inside a directory, opened without following links; reads are exact or raise CheckpointError."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / name
        if not _FILE_NAME.match(name):
            raise CheckpointError(
                f"{directory} names a file {name!r}; only letters, digits, '.', '_' and '-' may be used"
            )
        try:
            # Without O_NONBLOCK opening a pipe would wait for a writer for ever.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise read_error(self.path, exc) from exc
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"checkpoint file {self.path} is not a regular file")
        except BaseException:
            os.close(self._fd)
            raise
        self.size = status.st_size

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` (bytes) from byte `start` of the file."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done : done + 2**30]], start + done)
            except OSError as exc:
                raise read_error(self.path, exc) from exc
            if count == 0:
                raise CheckpointError(f"checkpoint file {self.path} ends at byte {start + done}, before its data does")
            done += count

    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes from byte `start`."""
        content = bytearray(length)
        self.read_into(start, memoryview(content))
        return bytes(content)


def read_whole(directory: Path, name: str, limit: int) -> bytes:
    """Return a small file's content; a file of more than `limit` bytes is refused before it is read."""
    with FileReader(directory, name) as reader:
        if reader.size > limit:
            raise CheckpointError(f"checkpoint file {reader.path} has {reader.size} bytes, more than {limit}")
        return reader.read(0, reader.size)


def write_file(path: Path, parts: Iterable[memoryview | bytes]) -> int:
    """Write a new file and make its content durable; return its size. An existing file is never touched."""
    size = 0
    with _reported("write", path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    written = os.write(fd, rest[: 2**30])
                    size += written
                    rest = rest[written:]
            os.fsync(fd)
        finally:
            os.close(fd)
    return size


def require_directory(path: Path) -> None:
    """Raise CheckpointError unless there is a directory at `path`."""
    try:
        status = path.stat()
    except OSError as exc:
        if exc.errno in _DAMAGE:
            raise CheckpointError(f"there is no checkpoint at {path}") from exc
        raise storage_error("read", path, exc) from exc
    if not stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"there is no checkpoint at {path}: it is not a directory")


def make_root(root: Path) -> None:
    """Make the directory that holds a run's checkpoints, and its parents, durably, where they are missing."""
    with _reported("make", root):
        missing = [path for path in (root, *root.parents) if not path.exists()]
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a new directory."""
    with _reported("make", path):
        path.mkdir(mode=0o755)


def sync_directory(path: Path) -> None:
    """Make the names inside a directory durable."""
    with _reported("sync", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def publish(staging: Path, final: Path) -> None:
    """Give a complete, synced staging directory its committed name; raise CheckpointError if that name is taken."""
    sync_directory(staging)
    try:
        staging.rename(final)
    except OSError as exc:
        if exc.errno in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
            raise CheckpointError(f"{final} was written by another process meanwhile; it is never overwritten") from exc
        raise storage_error("rename", staging, exc) from exc
    sync_directory(final.parent)


def put_aside(damaged: Path) -> Path:
    """Rename a damaged checkpoint out of the way, keeping it for the person who looks into it."""
    aside = damaged.with_name(f"{damaged.name}.damaged-{new_save_id()}")
    with _reported("rename", damaged):
        damaged.rename(aside)
    return aside


def remove_committed(path: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves a leftover and never half a checkpoint."""
    doomed = path.with_name(f"{path.name}.tmp-{new_save_id()}")
    with _reported("remove", path):
        path.rename(doomed)
        shutil.rmtree(doomed)


def discard(staging: Path) -> None:
    """Delete a staging directory as far as possible; what stays is removed by the next save."""
    shutil.rmtree(staging, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Delete the staging directories of saves that never finished; links are left alone."""
    with _reported("list", root), os.scandir(root) as entries:
        leftovers = [entry.path for entry in entries if _LEFTOVER.match(entry.name)]
    for leftover in leftovers:
        discard(Path(leftover))


def ensure_writable(root: Path) -> None:
    """Raise StorageError now rather than at the first save if checkpoints cannot be written under `root`."""
    make_root(root)
    probe = root / f"step-{0:08d}.tmp-{new_save_id()}"
    make_directory(probe)
    try:
        write_file(probe / "probe", [b"probe"])
    finally:
        discard(probe)


@contextmanager
def _reported(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise storage_error(action, path, exc) from exc
