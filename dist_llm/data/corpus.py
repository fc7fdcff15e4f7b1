"""The text that a model is trained on, as documents: `stdlib`, a folder of text and code, a text file, or JSONL.

    path -> find_corpus -> Corpus (files in one fixed order) -> read_documents -> str, str, ...

A file is a document; of a longer one each 8 MiB, cut at a line end, is one, and in JSONL each line `{"text": ...}`.
In a folder, hidden names, links and folders of runs are passed over; so are, counted, binaries and logs in JSONL.
Invariant: same files, same documents in the same order, unchanged to the last byte; memory is bounded by one section.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_llm.data.files import display, open_regular, storage_errors, user_path
from dist_llm.errors import DataError, StorageError
from dist_llm.types import RUN_LOCK

MIB = 1 << 20
STDLIB = "stdlib"
SECTION_BYTES = 8 * MIB
MAX_LINE_BYTES = 16 * MIB
_BINARY_PROBE_BYTES = 8192

# Third-party packages, tests, tables of character codes, and files that describe the machine Python was built on.
_STDLIB_PASSED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})
_STDLIB_PASSED_PREFIXES = ("_sysconfigdata", "config-")

OnSkip = Callable[[str, str], None]
"""Called with a file's name and the reason why it is passed over."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus: its place, its name inside the corpus, and what tells that it changed."""

    path: Path
    name: str
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Corpus:
    """A located corpus, not yet read. `explicit`: the one file that the user named, so bad bytes in it are an error."""

    location: str
    files: tuple[SourceFile, ...]
    explicit: bool = False

    def signature(self) -> str:
        """Return 64 hex digits that change when a file is added, removed, renamed, resized or modified."""
        facts = [self.location, self.explicit, [[file.name, file.num_bytes, file.modified_ns] for file in self.files]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.num_bytes for file in self.files)


def find_corpus(path: str) -> Corpus:
    """List the files behind `data.path` without reading them. Raises StorageError where there is nothing to read."""
    if path == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = (file for file in _walk(root, passed=_STDLIB_PASSED) if _is_stdlib_source(file.name))
        return Corpus(STDLIB, tuple(files))
    place = user_path("data.path", path)
    with storage_errors("find data.path", path):
        status = place.stat()
    if stat.S_ISDIR(status.st_mode):
        return Corpus(str(place), tuple(_walk(place)))
    open_regular(place).close()
    return Corpus(str(place), (SourceFile(place, place.name, status.st_size, status.st_mtime_ns),), explicit=True)


def _is_stdlib_source(name: str) -> bool:
    return name.endswith(".py") and not name.startswith(_STDLIB_PASSED_PREFIXES)


def _walk(root: Path, passed: frozenset[str] = frozenset()) -> Iterator[SourceFile]:
    """Yield the regular, visible files under `root`, a directory's own before its subdirectories', both by name.

    Links are not followed. Not entered: directories named in `passed`, and those of training runs, whose files grow
    while they are read. Raises StorageError.
    """

    def refuse(error: OSError) -> None:
        raise StorageError(f"cannot list {display(error.filename)}: {error.strerror}") from error

    for directory, subdirectories, names in os.walk(root, onerror=refuse):
        if RUN_LOCK in names and Path(directory) != root:
            subdirectories.clear()
            continue
        subdirectories[:] = sorted(
            name for name in subdirectories if not name.startswith(".") and name != "__pycache__" and name not in passed
        )
        for name in sorted(names):
            path = Path(directory, name)
            if name.startswith("."):
                continue
            with storage_errors("read", path):
                status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                yield SourceFile(path, str(path.relative_to(root)), status.st_size, status.st_mtime_ns)


def iter_documents(path: str, max_mib: float | None = None) -> Iterator[str]:
    """Yield the documents behind `data.path`, at most max_mib MiB of UTF-8. Raises DataError and StorageError."""
    return read_documents(find_corpus(path), max_mib)


def read_documents(corpus: Corpus, max_mib: float | None = None, on_skip: OnSkip | None = None) -> Iterator[str]:
    """Yield a corpus's documents that hold more than white space; the one that crosses max_mib MiB is cut to fit.

    Raises DataError naming file and offset (line, in JSONL) of what cannot be decoded, StorageError otherwise.
    """
    left = None if max_mib is None else int(max_mib * MIB)
    for file in corpus.files:
        for text in _documents_of(file, corpus.explicit, on_skip or _ignore):
            if not text or text.isspace():
                continue
            if left is not None:
                encoded = text.encode()
                if len(encoded) > left:
                    text = encoded[:left].decode("utf-8", "ignore")
                    if text and not text.isspace():
                        yield text
                    return
                left -= len(encoded)
            yield text


def _ignore(name: str, reason: str) -> None:
    del name, reason


def _documents_of(file: SourceFile, explicit: bool, on_skip: OnSkip) -> Iterator[str]:
    if file.name.endswith(".jsonl"):
        if explicit or _holds_documents(file):
            yield from _json_lines(file)
        else:
            on_skip(file.name, 'JSONL whose first line is no {"text": ...}')
        return
    for offset, content in _sections(file):
        if not explicit and offset == 0 and b"\0" in content[:_BINARY_PROBE_BYTES]:
            on_skip(file.name, "binary")
            return
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            if explicit:
                raise DataError(
                    f"{display(file.path)} is not UTF-8 text: byte {content[error.start]:#04x} at offset "
                    f"{offset + error.start} ({error.reason}); convert it to UTF-8"
                ) from error
            on_skip(file.name, "not UTF-8")
            return
        yield text


def _sections(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of a file in sections that end at a line end if there is one, else between characters."""
    offset, rest = 0, b""
    with open_regular(file.path) as stream:
        while True:
            with storage_errors("read", file.path):
                content = rest + stream.read(SECTION_BYTES - len(rest))
            if len(content) < SECTION_BYTES:
                break
            cut = content.rfind(b"\n") + 1 or _character_start(content)
            yield offset, content[:cut]
            offset, rest = offset + cut, content[cut:]
    if content:
        yield offset, content


def _character_start(content: bytes) -> int:
    """Return where the last, perhaps unfinished, UTF-8 character starts: the first byte that is no continuation."""
    for back in range(1, 5):
        if content[-back] & 0xC0 != 0x80:
            return len(content) - back
    return len(content)


def _holds_documents(file: SourceFile) -> bool:
    """Say whether a JSONL file among others is one of documents, by its first line that is not blank; else a log."""
    line = b"\n"
    with open_regular(file.path) as stream, storage_errors("read", file.path):
        while line.isspace():
            line = stream.readline(MAX_LINE_BYTES + 1)
    try:
        _text_of(line, file.name)
    except DataError:
        return not line
    return True


def _json_lines(file: SourceFile) -> Iterator[str]:
    with open_regular(file.path) as stream:
        number = 0
        while True:
            with storage_errors("read", file.path):
                line = stream.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{display(file.path)}:{number}: a line of over {MAX_LINE_BYTES // MIB} MiB; split it")
            if not line.isspace():
                yield _text_of(line, f"{display(file.path)}:{number}")


def _text_of(line: bytes, where: str) -> str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: byte {line[error.start]:#04x} at offset {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object: {error}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: must be a JSON object with a string "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'{where}: "text" holds half of a surrogate pair at character {error.start}') from error
    return text
