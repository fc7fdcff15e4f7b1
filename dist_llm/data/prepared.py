"""A prepared folder: indexed tokens, the tokenizer that made them, and a manifest that says what they must be.

    tokens.bin  tokens.idx  tokenizer.model  manifest.json {counts, vocab_size, files: {name: {num_bytes, sha256}}}

Invariant: it opens only where every file has the size in the manifest and the tokenizer is, to the bit, the one named.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dist_llm.data.files import display, file_sha256, open_regular, storage_errors, write_synced
from dist_llm.data.indexed import bin_path, idx_path
from dist_llm.errors import ConfigError, DataError, Violation

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
PREFIX = "tokens"
_MAX_MANIFEST_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 64


@dataclass(frozen=True)
class PreparedData:
    """What a run reads. fingerprint: 64 hex digits that name the tokens; tokenizer_sha256: of the model file."""

    prefix: Path
    tokenizer_path: Path
    num_tokens: int
    num_documents: int
    fingerprint: str
    tokenizer_sha256: str


class FileFacts(BaseModel):
    """What a file of the folder must be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What the folder holds and where it came from; skipped_files were binary or not UTF-8."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["dist_llm prepared data"] = "dist_llm prepared data"
    version: Literal[1] = 1
    source: str
    vocab_size: int = Field(gt=0)
    num_documents: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    num_text_bytes: int = Field(ge=0)
    skipped_files: int = Field(ge=0)
    files: dict[str, FileFacts]

    @property
    def fingerprint(self) -> str:
        """Name of the tokens: the SHA-256 of the checksums of both indexed files."""
        sums = [self.files[f"{PREFIX}{suffix}"].sha256 for suffix in (".bin", ".idx")]
        return hashlib.sha256("".join(sums).encode()).hexdigest()


NAMES = (f"{PREFIX}.bin", f"{PREFIX}.idx", TOKENIZER)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, flushed to the disk, as the last file of a folder."""
    write_synced(folder / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest. Raises DataError where it is none, StorageError where it cannot be read."""
    path = folder / MANIFEST
    with open_regular(path) as file, storage_errors("read", path):
        content = file.read(_MAX_MANIFEST_BYTES + 1)
    try:
        if len(content) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"over {_MAX_MANIFEST_BYTES} bytes")
        manifest = Manifest.model_validate_json(content)
    except (ValidationError, ValueError) as error:
        raise DataError(f"{display(path)} is not a manifest of prepared data: {error}. {_remedy(folder)}") from error
    if set(manifest.files) != set(NAMES):
        raise DataError(f"{display(path)} must list {', '.join(NAMES)} and nothing else. {_remedy(folder)}")
    return manifest


def _remedy(folder: Path) -> str:
    return f"Delete the folder {display(folder)} to prepare it again"


def open_prepared(folder: Path, vocab_size: int) -> PreparedData:
    """Open a prepared folder: sizes of all files and the tokenizer's checksum are compared with the manifest.

    Raises DataError where they differ, ConfigError where it was made for another vocabulary, StorageError.
    """
    with storage_errors("read", folder):
        present = {entry.name for entry in folder.iterdir()}
    if missing := [name for name in (MANIFEST, *NAMES) if name not in present]:
        raise DataError(f"{display(folder)} lacks {', '.join(missing)}: it is damaged. {_remedy(folder)}")
    manifest = read_manifest(folder)
    for name, facts in manifest.files.items():
        with storage_errors("read", folder / name):
            num_bytes = (folder / name).stat().st_size
        if num_bytes != facts.num_bytes:
            raise DataError(
                f"{display(folder / name)} is damaged: it holds {num_bytes} bytes, not the {facts.num_bytes} "
                f"of its manifest. {_remedy(folder)}"
            )
    tokenizer_sha256 = file_sha256(folder / TOKENIZER)
    if tokenizer_sha256 != manifest.files[TOKENIZER].sha256:
        raise DataError(f"{display(folder / TOKENIZER)} is damaged: wrong checksum. {_remedy(folder)}")
    require_vocab(vocab_size, manifest.vocab_size, folder)
    return PreparedData(
        prefix=folder / PREFIX,
        tokenizer_path=folder / TOKENIZER,
        num_tokens=manifest.num_tokens,
        num_documents=manifest.num_documents,
        fingerprint=manifest.fingerprint,
        tokenizer_sha256=tokenizer_sha256,
    )


def require_vocab(vocab_size: int, tokenizer_vocab_size: int, path: Path) -> None:
    """Raise ConfigError naming model.vocab_size unless it is the tokenizer's, which `path` names."""
    if vocab_size != tokenizer_vocab_size:
        rule = f"must equal the {tokenizer_vocab_size} pieces of the tokenizer of {display(path)}"
        raise ConfigError([Violation("model.vocab_size", vocab_size, rule, (tokenizer_vocab_size,))])


def sampled_fingerprint(prefix: Path) -> str:
    """Return a name for tokens without a manifest: SHA-256 of the sizes and of evenly spaced parts of both files."""
    digest = hashlib.sha256()
    for path in (bin_path(prefix), idx_path(prefix)):
        with open_regular(path) as file, storage_errors("read", path):
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            last = max(0, size - _SAMPLE_BYTES)
            for start in sorted({last * index // (_SAMPLES - 1) for index in range(_SAMPLES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
