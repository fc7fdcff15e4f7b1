"""Look at checkpoints without loading them: what they hold, and whether every byte is what was saved. No torch.

Invariant: reading only; `verify` covers each byte of the manifest, its digest and every file that it lists.
"""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path

from dist_llm.checkpoint.manifest import (
    DTYPE_BYTES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIDECAR,
    Manifest,
    SavedFile,
    chunk_bytes,
    parse_manifest,
    sidecar_text,
    start_chunk_digest,
)
from dist_llm.checkpoint.storage import FileReader, list_steps, read_whole, require_directory, step_of
from dist_llm.errors import CheckpointError

_BLOCK_BYTES = 4 * 2**20


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """Return the manifest of the checkpoint at `path` and its sha256; CheckpointError if it is not sound."""
    require_directory(path)
    raw = read_whole(path, MANIFEST, MAX_MANIFEST_BYTES)
    expected = sidecar_text(raw)
    if read_whole(path, SIDECAR, 4096) != expected:
        raise CheckpointError(f"checkpoint file {path / MANIFEST} does not match the sha256 in {SIDECAR}")
    manifest = parse_manifest(raw, str(path / MANIFEST))
    if step_of(path) not in {None, manifest.step}:
        raise CheckpointError(f"{path} holds step {manifest.step}; the directory has another step's name")
    return manifest, expected[:64].decode("ascii")


def open_saved(path: Path, saved: SavedFile) -> FileReader:
    """Open a file of a checkpoint after checking its size and header; CheckpointError naming it if it is damaged."""
    reader = FileReader(path, saved.name)
    try:
        if reader.size != saved.size:
            raise CheckpointError(
                f"checkpoint file {reader.path} has {reader.size} bytes where the manifest says {saved.size}"
            )
        digest = hashlib.sha256(reader.read(0, saved.header_bytes)).hexdigest()
        if digest != saved.header_sha256:
            raise CheckpointError(f"checkpoint file {reader.path} is damaged: its header fails its sha256")
    except BaseException:
        reader.close()
        raise
    return reader


def verify(path: Path) -> list[str]:
    """Return what is wrong with the checkpoint at `path`, naming files and tensors; empty when it is sound."""
    try:
        manifest, _ = read_manifest(path)
    except CheckpointError as exc:
        return [str(exc)]
    return damage(path, manifest)


def damage(path: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with the files at positions part, part + parts, ... of a manifest."""
    problems = []
    for index in range(part, len(manifest.files), parts):
        try:
            with open_saved(path, manifest.files[index]) as reader:
                problems.extend(_damaged_chunks(reader, manifest, index))
        except CheckpointError as exc:
            problems.append(str(exc))
    return problems


def describe(path: Path) -> dict[str, object]:
    """Return what the checkpoint at `path` holds, as a JSON tree; CheckpointError when its manifest is not sound."""
    manifest, digest = read_manifest(path)
    return {
        "path": str(path),
        "step": manifest.step,
        "manifest_sha256": digest,
        "parent": manifest.parent,
        "dist_llm": manifest.dist_llm,
        "torch": manifest.torch,
        "ranks": manifest.ranks,
        "bytes": sum(saved.size for saved in manifest.files),
        "files": {saved.name: saved.size for saved in manifest.files},
        "facts": manifest.facts,
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": prod(tensor.shape) * DTYPE_BYTES[tensor.dtype],
                "chunks": len(tensor.chunks),
            }
            for name, tensor in sorted(manifest.tensors.items())
        },
    }


def list_checkpoints(root: Path) -> list[dict[str, object]]:
    """Return a row for each committed checkpoint under `root`, newest first; `problem` is None when it seems sound.

    Only manifests, sizes and headers are looked at: `verify` hashes the files too.
    """
    rows: list[dict[str, object]] = []
    for step, path in list_steps(root):
        row: dict[str, object] = {"step": step, "path": str(path), "ranks": None, "tensors": None, "bytes": None}
        try:
            manifest, _ = read_manifest(path)
            for saved in manifest.files:
                open_saved(path, saved).close()
        except CheckpointError as exc:
            rows.append({**row, "problem": str(exc)})
            continue
        size = sum(saved.size for saved in manifest.files)
        rows.append({**row, "ranks": manifest.ranks, "tensors": len(manifest.tensors), "bytes": size, "problem": None})
    return rows


def _damaged_chunks(reader: FileReader, manifest: Manifest, file: int) -> list[str]:
    """Hash every rectangle of an open file in blocks; return those that are not what was saved."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    problems = []
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            if chunk.file != file:
                continue
            digest = start_chunk_digest(manifest.step, name, tensor.dtype, tensor.shape, chunk.offsets, chunk.shape)
            left, start = chunk_bytes(tensor, chunk), chunk.start
            while left:
                view = block[: min(left, _BLOCK_BYTES)]
                reader.read_into(start, view)
                digest.update(view)
                left, start = left - len(view), start + len(view)
            if digest.hexdigest() != chunk.sha256:
                problems.append(
                    f"checkpoint file {reader.path}: tensor {name} at {list(chunk.offsets)} fails its sha256"
                )
    return problems
