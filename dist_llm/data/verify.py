"""Is this data set what it says it is? Every byte and every token is read; nothing is changed.

Opening a data set compares sizes only, so that a run starts at once: a flipped bit is found here, by its checksum,
and an id that the model has no embedding for by a scan in blocks, in constant memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_llm.data.files import display, file_sha256
from dist_llm.data.indexed import IndexedDataset
from dist_llm.data.prepared import MANIFEST, PREFIX, read_manifest
from dist_llm.errors import DataError

_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class DatasetReport:
    """What a data set holds and what is wrong with it; min_token and max_token are None without tokens.

    empty_documents counts documents without a token; checksums_compared says whether there were any to compare.
    """

    prefix: str
    dtype: str
    num_tokens: int
    num_documents: int
    empty_documents: int
    longest_document: int
    min_token: int | None
    max_token: int | None
    checksums_compared: bool
    problems: tuple[str, ...]
    ok: bool


def verify_dataset(prefix: Path, vocab_size: int) -> DatasetReport:
    """Read all of `<prefix>.bin` and `.idx` and return what was found; `problems` is empty for a sound data set.

    Raises DataError where the files contradict each other, so that they cannot be read at all, and StorageError.
    """
    dataset = IndexedDataset(prefix)
    problems: list[str] = []
    manifest_there = prefix.name == PREFIX and (prefix.parent / MANIFEST).is_file()
    if manifest_there:
        problems += _compare(prefix.parent, vocab_size)
    lengths = np.diff(dataset.bounds[dataset.documents])
    if not dataset.num_tokens:
        problems.append(f"{display(dataset.path)} holds no tokens")
    lowest, highest, bad = _scan(dataset, vocab_size)
    if bad is not None:
        document = int(np.searchsorted(dataset.bounds[dataset.documents], bad, side="right")) - 1
        problems.append(
            f"{display(dataset.path)} holds token {int(dataset.tokens[bad])} at position {bad}, "
            f"in document {document}, outside model.vocab_size={vocab_size}"
        )
    return DatasetReport(
        prefix=display(prefix),
        dtype=dataset.dtype.name,
        num_tokens=dataset.num_tokens,
        num_documents=dataset.num_documents,
        empty_documents=int(np.count_nonzero(lengths == 0)),
        longest_document=int(lengths.max()) if len(lengths) else 0,
        min_token=lowest,
        max_token=highest,
        checksums_compared=manifest_there,
        problems=tuple(problems),
        ok=not problems,
    )


def _compare(folder: Path, vocab_size: int) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [str(error)]
    problems = [
        f"{display(folder / name)} is damaged: its checksum is not the one in {MANIFEST}"
        for name, facts in manifest.files.items()
        if file_sha256(folder / name) != facts.sha256
    ]
    if manifest.vocab_size != vocab_size:
        problems.append(f"model.vocab_size={vocab_size}, but the tokens were made with {manifest.vocab_size} pieces")
    return problems


def _scan(dataset: IndexedDataset, vocab_size: int) -> tuple[int | None, int | None, int | None]:
    """Return the least and the greatest id and the position of the first id outside the vocabulary."""
    lowest: int | None = None
    highest: int | None = None
    bad: int | None = None
    for start in range(0, dataset.num_tokens, _BLOCK_TOKENS):
        block = dataset.tokens[start : start + _BLOCK_TOKENS]
        low, high = int(block.min()), int(block.max())
        lowest = low if lowest is None else min(lowest, low)
        highest = high if highest is None else max(highest, high)
        if bad is None and (low < 0 or high >= vocab_size):
            bad = start + int(np.argmax((block < 0) | (block >= vocab_size)))
    return lowest, highest, bad
