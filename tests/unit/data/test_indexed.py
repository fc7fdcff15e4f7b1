"""The indexed format, byte for byte as Megatron-LM writes it, and every way in which a pair of files can be wrong."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dist_llm.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path, token_dtype
from dist_llm.errors import DataError, StorageError
from tests.unit.data.corpora import REPOSITORY

DOCUMENTS = [[5, 6, 7, 1], [1], [300, 2, 1], [9] * 17]


def reference_files(documents: Sequence[Sequence[int]], code: int, letter: str) -> tuple[bytes, bytes]:
    """Return (.bin, .idx) as Megatron-LM's indexed_dataset.py lays them out, by struct alone."""
    flat = [token for document in documents for token in document]
    width = struct.calcsize(f"<{letter}")
    pointers = [width * sum(map(len, documents[:index])) for index in range(len(documents))]
    count = len(documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, count, count + 1)
    index += struct.pack(f"<{count}i", *map(len, documents)) + struct.pack(f"<{count}q", *pointers)
    index += struct.pack(f"<{count + 1}q", *range(count + 1))
    return struct.pack(f"<{len(flat)}{letter}", *flat), index


def write(prefix: Path, documents: Sequence[Sequence[int]] = DOCUMENTS, vocab_size: int = 400) -> Path:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(400, 8, "H"), (65499, 8, "H"), (65500, 4, "i")])
def test_the_files_are_megatrons_to_the_byte(tmp_path: Path, vocab_size: int, code: int, letter: str) -> None:
    prefix = write(tmp_path / "tokens", vocab_size=vocab_size)
    expected = reference_files(DOCUMENTS, code, letter)
    assert (bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()) == expected
    assert token_dtype(vocab_size).itemsize == struct.calcsize(letter)


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_integer_type_is_read(tmp_path: Path, code: int, letter: str) -> None:
    documents = [[5, 100, 1], [], [7]]
    content, index = reference_files(documents, code, letter)
    (tmp_path / "tokens.bin").write_bytes(content)
    (tmp_path / "tokens.idx").write_bytes(index)
    dataset = IndexedDataset(tmp_path / "tokens")
    assert dataset.tokens.tolist() == [5, 100, 1, 7]
    assert [dataset.document(index).tolist() for index in range(3)] == documents
    assert (dataset.num_tokens, dataset.num_sequences, dataset.num_documents) == (4, 3, 3)


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    content, index = reference_files(DOCUMENTS, 8, "H")
    head = index[: struct.calcsize("<9sQB")] + struct.pack("<QQ", 4, 3) + index[struct.calcsize("<9sQBQQ") :][: 12 * 4]
    (tmp_path / "tokens.bin").write_bytes(content)
    (tmp_path / "tokens.idx").write_bytes(head + struct.pack("<3q", 0, 2, 4))
    dataset = IndexedDataset(tmp_path / "tokens")
    assert dataset.num_documents == 2
    assert dataset.document(0).tolist() == [5, 6, 7, 1, 1]


def test_windows_are_slices_of_the_stream(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "tokens"))
    flat = [token for document in DOCUMENTS for token in document]
    windows = dataset.windows(np.array([0, 20, 3]), 5)
    assert windows.dtype == np.int64
    assert windows.tolist() == [flat[start : start + 5] for start in (0, 20, 3)]
    for start in (-1, 21):
        with pytest.raises(IndexError):
            dataset.windows(np.array([0, start]), 5)
    with pytest.raises(IndexError):
        dataset.document(4)


def test_an_empty_data_set_opens_and_holds_nothing(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "tokens", []))
    assert (dataset.num_tokens, dataset.num_documents) == (0, 0)


def test_a_writer_refuses_ids_outside_the_vocabulary_and_existing_files(tmp_path: Path) -> None:
    for token in (-1, 400, 65536 + 5):
        with pytest.raises(DataError, match="do not fit a vocabulary of 400"):
            write(tmp_path / f"tokens{token}", [[1, token]])
    write(tmp_path / "tokens")
    before = bin_path(tmp_path / "tokens").read_bytes()
    with pytest.raises(StorageError, match="File exists"):
        IndexedWriter(tmp_path / "tokens", 400)
    assert bin_path(tmp_path / "tokens").read_bytes() == before


def test_checksums_are_of_the_files(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "tokens", 400)
    for document in DOCUMENTS:
        writer.add(document)
    writer.close()
    assert writer.bin_sha256 == hashlib.sha256((tmp_path / "tokens.bin").read_bytes()).hexdigest()
    assert writer.idx_sha256 == hashlib.sha256((tmp_path / "tokens.idx").read_bytes()).hexdigest()


def damaged(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=path.name.split(".")[0]) as caught:
        IndexedDataset(path.parent / path.stem)
    assert caught.value.exit_code == 65


def test_every_truncation_and_extension_is_refused_at_open(tmp_path: Path) -> None:
    prefix = write(tmp_path / "tokens")
    for path in (bin_path(prefix), idx_path(prefix)):
        whole = path.read_bytes()
        for length in range(len(whole)):
            damaged(path, whole[:length])
        damaged(path, whole + b"\0")
        path.write_bytes(whole)
        IndexedDataset(prefix)


def test_every_single_bit_of_the_index_is_checked_at_open(tmp_path: Path) -> None:
    path = idx_path(write(tmp_path / "tokens"))
    whole = bytearray(path.read_bytes())
    for bit in range(8 * len(whole)):
        whole[bit // 8] ^= 1 << bit % 8
        damaged(path, bytes(whole))
        whole[bit // 8] ^= 1 << bit % 8


def test_impossible_indexes_are_refused_quickly(tmp_path: Path) -> None:
    path = idx_path(write(tmp_path / "tokens"))
    rng = random.Random(0)
    header = struct.Struct("<9sQBQQ")
    for counts in [(2**63, 1), (2**64 - 1, 2**64 - 1), (0, 0), (2**40, 2**40)]:
        damaged(path, header.pack(b"MMIDIDX\0\0", 1, 8, *counts))
    for _ in range(200):
        damaged(path, rng.randbytes(rng.randrange(200)))
    damaged(path, header.pack(b"MMIDIDX\0\0", 1, 8, 2, 3) + struct.pack("<2i2q3q", 30, -5, 0, 60, 0, 1, 2))


def test_missing_files_are_storage_errors(tmp_path: Path) -> None:
    prefix = write(tmp_path / "tokens")
    bin_path(prefix).unlink()
    with pytest.raises(StorageError, match=r"tokens\.bin: No such file"):
        IndexedDataset(prefix)
    with pytest.raises(StorageError, match=r"none\.idx: No such file"):
        IndexedDataset(tmp_path / "none")


@pytest.mark.parametrize("change", ["truncate", "modify", "replace", "remove"])
def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path: Path, change: str) -> None:
    prefix = write(tmp_path / "tokens", [[1, 2, 3] * 4000])
    dataset = IndexedDataset(prefix)
    assert dataset.windows(np.array([0]), 3).tolist() == [[1, 2, 3]]
    path = bin_path(prefix)
    content = path.read_bytes()
    if change == "truncate":
        path.write_bytes(b"")
    elif change == "modify":
        with path.open("r+b") as file:
            file.write(b"\7")
    else:
        path.unlink()
        if change == "replace":
            path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokens\.bin was changed, replaced or removed"):
        dataset.windows(np.array([9000]), 3)


FULL_DISK = """
import resource, sys
from pathlib import Path
from dist_llm.data.indexed import IndexedWriter
from dist_llm.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with IndexedWriter(Path(sys.argv[1]), 400) as writer:
        for _ in range(int(sys.argv[2])):
            writer.add([7] * 1000)
except StorageError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


@pytest.mark.parametrize("documents", [3, 50])
def test_a_full_disk_is_a_storage_error(tmp_path: Path, documents: int) -> None:
    # 3 documents stay in the buffer until close, 50 do not.
    argv = [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path / "tokens"), str(documents)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, cwd=REPOSITORY)
    assert (result.returncode, result.stderr) == (74, "")
    assert "cannot write" in result.stdout
