"""Tokens on disk in Megatron-LM's indexed format, memory-mapped (MMIDIDX version 1, little endian).

    .bin  the tokens of all documents, one after the other
    .idx  magic 9s | version u64 | dtype u8 | S u64 | D u64 | lengths i32[S] | byte offsets i64[S] | documents i64[D]

Written here, a document is one sequence that ends with end-of-document: `documents` is 0, 1, ..., S (D = S + 1).
Invariant: a pair of files whose parts contradict each other, or whose sizes differ from what they say, never opens.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_llm.data.files import display, open_regular, storage_errors, write_synced
from dist_llm.errors import DataError, StorageError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of integer tokens; 6 and 7 are float64 and float32, which are no token ids."""
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_UINT16_VOCAB = 65500
_MAX_DOCUMENT = 2**31 - 1

AnyArray = NDArray[np.integer]
Int64Array = NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Return the type that Megatron-LM stores ids of this vocabulary in: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCAB else "<i4")


def bin_path(prefix: Path) -> Path:
    """Return the file of tokens."""
    return prefix.parent / f"{prefix.name}.bin"


def idx_path(prefix: Path) -> Path:
    """Return the file that says where each document lies."""
    return prefix.parent / f"{prefix.name}.idx"


class IndexedWriter:
    """Writes `<prefix>.bin` document by document and `<prefix>.idx` on close; both are new files, flushed to the disk.

    After close, `bin_sha256` and `idx_sha256` are of the bytes as they were given, not as the disk holds them.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self.num_tokens = 0
        self.bin_sha256 = self.idx_sha256 = ""
        with storage_errors("write", bin_path(prefix)):
            self._file = bin_path(prefix).open("xb")

    @property
    def num_documents(self) -> int:
        """Number of documents written so far."""
        return len(self._lengths)

    def add(self, tokens: Sequence[int] | AnyArray) -> None:
        """Append one document. Raises DataError where an id is outside the vocabulary, StorageError."""
        ids = np.asarray(tokens, dtype=np.int64)
        if len(ids) > _MAX_DOCUMENT:
            raise DataError(f"a document of {len(ids)} tokens; the format holds at most {_MAX_DOCUMENT}")
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._vocab_size):
            raise DataError(f"token ids {ids.min()} to {ids.max()} do not fit a vocabulary of {self._vocab_size}")
        content = ids.astype(self._dtype).tobytes()
        self._digest.update(content)
        with storage_errors("write", bin_path(self._prefix)):
            self._file.write(content)
        self._lengths.append(len(ids))
        self.num_tokens += len(ids)

    def close(self) -> None:
        """Write the index and flush both files to the disk. Raises StorageError."""
        with storage_errors("write", bin_path(self._prefix)), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        index = encode_index(np.asarray(self._lengths, dtype=np.int64), self._dtype)
        write_synced(idx_path(self._prefix), index)
        self.bin_sha256 = self._digest.hexdigest()
        self.idx_sha256 = hashlib.sha256(index).hexdigest()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            # A full disk refuses again what is still in the buffer; the first refusal is the one to report.
            with suppress(OSError):
                self._file.close()


def encode_index(lengths: Int64Array, dtype: np.dtype[np.integer]) -> bytes:
    """Return the bytes of an `.idx` file for documents of these lengths, [S]."""
    count = len(lengths)
    header = _HEADER.pack(MAGIC, VERSION, _CODES[dtype], count, count + 1)
    offsets = _bounds(lengths)[:-1] * dtype.itemsize
    documents = np.arange(count + 1, dtype=np.int64)
    return b"".join([header, *(part.tobytes() for part in (lengths.astype("<i4"), offsets, documents))])


def _bounds(lengths: Int64Array) -> Int64Array:
    """Return the token at which each sequence starts and, last, their number, [S + 1]."""
    bounds = np.zeros(len(lengths) + 1, dtype="<i8")
    np.cumsum(lengths, out=bounds[1:])
    return bounds


class IndexedDataset:
    """A memory-mapped data set, checked when it is opened.

    tokens: [num_tokens], all sequences end to end; bounds: [num_sequences + 1], where each starts in `tokens`;
    documents: [num_documents + 1], the sequence at which each document starts.
    """

    def __init__(self, prefix: Path) -> None:
        """Open `<prefix>.bin` and `.idx`. Raises DataError naming the file and what is wrong with it, StorageError."""
        self.path = bin_path(prefix)
        self.dtype, self.bounds, self.documents = _read_index(idx_path(prefix))
        expected = int(self.bounds[-1]) * self.dtype.itemsize
        with open_regular(self.path) as file, storage_errors("map", self.path):
            self._opened = _identity(os.fstat(file.fileno()))
            size = file.seek(0, os.SEEK_END)
            if size != expected:
                raise DataError(
                    f"{display(self.path)} holds {size} bytes, but {idx_path(prefix).name} says {expected}: "
                    "one of them is damaged or belongs to another data set"
                )
            content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        self.tokens: AnyArray = np.frombuffer(content, dtype=self.dtype)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """Number of stored sequences."""
        return len(self.bounds) - 1

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    def document(self, index: int) -> Int64Array:
        """Return the tokens of one document, [length]. Raises IndexError outside [0, num_documents)."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        start, end = self.bounds[self.documents[index : index + 2]].tolist()
        return self.windows(np.asarray([start], dtype=np.int64), end - start).reshape(-1)

    def windows(self, starts: Int64Array, length: int) -> Int64Array:
        """Return [N, length]: `length` tokens from each of starts [N]. Raises DataError where the file has changed."""
        self._require_unchanged()
        if len(starts) and not (starts.min() >= 0 and starts.max() + length <= self.num_tokens):
            raise IndexError(f"{length} tokens from {starts.min()} to {starts.max()} are not all in {self.num_tokens}")
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in enumerate(starts):
            out[row] = self.tokens[start : start + length]
        return out

    def _require_unchanged(self) -> None:
        """Raise DataError unless the file is the one that was opened: a mapping that shrank kills who reads it."""
        try:
            same = _identity(self.path.stat()) == self._opened
        except OSError:
            same = False
        if not same:
            raise DataError(f"{display(self.path)} was changed, replaced or removed while it was in use; restore it")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_index(path: Path) -> tuple[np.dtype[np.integer], Int64Array, Int64Array]:
    """Return (dtype, bounds [S + 1], documents [D]) of an `.idx` file. Raises DataError where any part is wrong."""
    shown = display(path)
    with open_regular(path) as file, storage_errors("read", path):
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{shown} is not a Megatron .idx file: it does not start with {MAGIC!r} and a whole header")
        _, version, code, num_sequences, num_documents = _HEADER.unpack(header)
        if version != VERSION:
            raise DataError(f"{shown} has format version {version}; only version {VERSION} can be read")
        if code not in _DTYPES:
            raise DataError(f"{shown} has token type code {code}; only the integers {sorted(_DTYPES)} can be read")
        # Sizes are compared before anything is allocated: the counts may be any 64-bit number.
        expected = _HEADER.size + 12 * num_sequences + 8 * num_documents
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            raise DataError(
                f"{shown} holds {size} bytes, but its header says {num_sequences} sequences "
                f"and {num_documents} document bounds, which take {expected}"
            )
        content = file.read(expected - _HEADER.size)
    if len(content) != expected - _HEADER.size:
        raise StorageError(f"cannot read {shown}: it shrank while it was being read")
    dtype: np.dtype[np.integer] = np.dtype(_DTYPES[code])
    lengths = np.frombuffer(content, "<i4", num_sequences).astype(np.int64)
    offsets = np.frombuffer(content, "<i8", num_sequences, offset=4 * num_sequences)
    documents = np.frombuffer(content, "<i8", num_documents, offset=12 * num_sequences)
    if len(lengths) and lengths.min() < 0:
        raise DataError(f"{shown} gives sequence {int(lengths.argmin())} a length of {int(lengths.min())}")
    bounds = _bounds(lengths)
    if not np.array_equal(offsets, bounds[:-1] * dtype.itemsize):
        raise DataError(f"{shown} gives offsets that do not follow from its lengths: sequences must lie end to end")
    spanned = len(documents) > 0 and documents[0] == 0 and documents[-1] == num_sequences
    if not spanned or bool(np.any(np.diff(documents) <= 0)):
        raise DataError(f"{shown} gives document bounds that do not rise from 0 to its {num_sequences} sequences")
    return dtype, bounds, documents
