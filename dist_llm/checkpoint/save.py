"""Save: every rank writes its primary rectangles into a private directory, rank 0 lists them, one rename commits.

    begin (rank 0) -> write_part (each rank) -> commit (rank 0): check cover, manifest, fsync, rename, fsync
Source: atomic commit after FAULTS 4.4; the file format is safetensors (8-byte header length, JSON header, data).
Invariant: until the rename nothing under a committed name has changed; after it the checkpoint is whole and durable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch

from dist_llm import __version__
from dist_llm.checkpoint.agreement import Channel, connect, each, lead
from dist_llm.checkpoint.cover import IncompleteStateError
from dist_llm.checkpoint.inspect import read_manifest, verify
from dist_llm.checkpoint.load import require_equal, shared_problem
from dist_llm.checkpoint.manifest import (
    DTYPE_BYTES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIDECAR,
    VERSION,
    parse_manifest,
    sidecar_text,
    start_chunk_digest,
)
from dist_llm.checkpoint.storage import (
    MAX_STEP,
    discard,
    list_steps,
    make_directory,
    make_root,
    new_save_id,
    publish,
    put_aside,
    remove_leftovers,
    staging_directory,
    step_directory,
    storage_error,
    sync_directory,
    write_file,
)
from dist_llm.checkpoint.strict_json import dump, plain
from dist_llm.checkpoint.tensors import DTYPE_NAMES, bytes_of, check_shards
from dist_llm.errors import CheckpointError, DistLLMError, StorageError
from dist_llm.types import TensorShard, TrainState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FileEntry(TypedDict):
    """`SavedFile` before it is checked."""

    name: str
    size: int
    header_bytes: int
    header_sha256: str


class ChunkEntry(TypedDict):
    """`Chunk` before it is checked; `file` is known once all ranks' files are."""

    file: NotRequired[int]
    start: int
    offsets: list[int]
    shape: list[int]
    sha256: str


class TensorEntry(TypedDict):
    """`SavedTensor` before it is checked."""

    dtype: str
    shape: list[int]
    chunks: list[ChunkEntry]


class Part(TypedDict):
    """What one rank wrote: its file if it had anything to write, the tensors it holds with the chunks it wrote."""

    file: FileEntry | None
    facts_sha256: str
    tensors: dict[str, TensorEntry]


def save(root: Path, step: int, state: TrainState, group: ProcessGroup | None = None) -> Path:
    """Commit `state` as the checkpoint of `step` under `root` and return its directory; every rank calls it.

    The primary shards of all ranks must tile each tensor exactly once and the facts be equal on all ranks, else
    IncompleteStateError (our bug). A sound checkpoint of this step is kept when it holds the same state, else
    CheckpointError; a damaged one is put aside. StorageError when any rank cannot write. Every rank raises the same
    error, and then no new name is committed (but for an error of the very last sync, of `root`: saving again settles
    it). Collectives over `group` (CPU): 3 broadcasts, 1 gather; where a sound one is there, 6 and 2.
    """
    return save_over(connect(group), root, step, state)


def save_over(channel: Channel, root: Path, step: int, state: TrainState) -> Path:
    """Save through a channel; see `save`."""
    final = step_directory(root, step)
    save_id = lead(channel, lambda: _begin(root, step))
    if save_id is None:
        if shared_problem(channel, final) is None:
            require_equal(channel, final, state)
            lead(channel, lambda: sync_directory(root))
            return final
        save_id = lead(channel, lambda: _stage(root, step))
    staging = staging_directory(root, step, save_id)
    try:
        parts = each(channel, lambda: write_part(staging, channel.rank, step, state))
        lead(channel, lambda: _commit(staging, final, step, save_id, state.facts, parts))
    except BaseException:
        if channel.rank == 0:
            discard(staging)
        raise
    return final


def write_part(staging: Path, rank: int, step: int, state: TrainState) -> Part:
    """Write this rank's primary rectangles, durably, to one safetensors file; return what was written."""
    check_shards(state.tensors)
    tensors: dict[str, TensorEntry] = {
        shard.name: {"dtype": DTYPE_NAMES[shard.data.dtype], "shape": list(shard.shape), "chunks": []}
        for shard in state.tensors
    }
    facts_sha256 = hashlib.sha256(dump(_plain_facts(state.facts))).hexdigest()
    # Widest elements first, as safetensors asks, so that every rectangle is aligned.
    shards = sorted(
        (shard for shard in state.tensors if shard.primary and shard.data.numel()),
        key=lambda shard: (-shard.data.element_size(), shard.name, shard.offsets),
    )
    if not shards:
        return {"file": None, "facts_sha256": facts_sha256, "tensors": tensors}
    if not staging.is_dir():
        raise StorageError(f"{staging} is not there: all ranks must see the same run.dir, on a shared file system")
    header = _header(step, shards)
    path = staging / f"rank-{rank:05d}.safetensors"
    size = write_file(path, _content(step, header, shards, tensors))
    file: FileEntry = {
        "name": path.name,
        "size": size,
        "header_bytes": len(header),
        "header_sha256": hashlib.sha256(header).hexdigest(),
    }
    return {"file": file, "facts_sha256": facts_sha256, "tensors": tensors}


def _begin(root: Path, step: int) -> str | None:
    """Clear leftovers and make the staging directory; return its id, or None when a checkpoint of the step is there."""
    if not 0 <= step <= MAX_STEP:
        raise IncompleteStateError(f"step {step} is not between 0 and {MAX_STEP}")
    return None if step_directory(root, step).is_dir() else _stage(root, step)


def _stage(root: Path, step: int) -> str:
    save_id = new_save_id()
    make_root(root)
    remove_leftovers(root)
    make_directory(staging_directory(root, step, save_id))
    return save_id


def _content(
    step: int, header: bytes, shards: list[TensorShard], tensors: dict[str, TensorEntry]
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a file, one rectangle staged at a time, and list each one in `tensors`."""
    yield header
    start = len(header)
    for shard in shards:
        staged = bytes_of(shard.data)
        shape, offsets, lengths = tuple(shard.shape), tuple(shard.offsets), tuple(shard.data.shape)
        digest = start_chunk_digest(step, shard.name, DTYPE_NAMES[shard.data.dtype], shape, offsets, lengths)
        digest.update(staged)
        tensors[shard.name]["chunks"].append(
            {"start": start, "offsets": list(offsets), "shape": list(lengths), "sha256": digest.hexdigest()}
        )
        start += len(staged)
        yield staged


def _header(step: int, shards: list[TensorShard]) -> bytes:
    """Return a safetensors header: a whole tensor goes by its name, a rectangle by `name|offsets`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "step": str(step)}}
    start = 0
    for shard in shards:
        dtype, lengths = DTYPE_NAMES[shard.data.dtype], list(shard.data.shape)
        stop = start + prod(lengths) * DTYPE_BYTES[dtype]
        whole = lengths == list(shard.shape)
        key = shard.name if whole else f"{shard.name}|{','.join(map(str, shard.offsets))}"
        if key in entries:
            raise IncompleteStateError(f"tensor {shard.name} is offered twice at {list(shard.offsets)} by one rank")
        entries[key] = {"dtype": dtype, "shape": lengths, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _commit(
    staging: Path, final: Path, step: int, save_id: str, facts: Mapping[str, object], parts: list[Part]
) -> None:
    """Write manifest and digest, sync, and rename. What could not be loaded again is refused here."""
    files, tensors = _merge(parts)
    for saved in files:
        _check_size(staging / saved["name"], saved["size"])
    tree = {
        "format": "dist_llm.checkpoint",
        "version": VERSION,
        "step": step,
        "save_id": save_id,
        "parent": _parent(final.parent, step),
        "dist_llm": __version__,
        "torch": str(torch.__version__),
        "ranks": len(parts),
        "facts": _plain_facts(facts),
        "files": files,
        "tensors": tensors,
    }
    manifest = dump(tree)
    if len(manifest) > MAX_MANIFEST_BYTES:
        raise StorageError(f"the manifest of step {step} would have {len(manifest)} bytes, over {MAX_MANIFEST_BYTES}")
    try:
        parse_manifest(manifest, "the state")
    except CheckpointError as exc:
        raise IncompleteStateError(f"step {step} is not saved: {exc}") from exc
    write_file(staging / MANIFEST, [manifest])
    write_file(staging / SIDECAR, [sidecar_text(manifest)])
    if (final.exists() or final.is_symlink()) and verify(final):
        put_aside(final)
    publish(staging, final)


def _merge(parts: list[Part]) -> tuple[list[FileEntry], dict[str, TensorEntry]]:
    """Return the files of all ranks and the union of their tensors; raise IncompleteStateError where ranks disagree."""
    files: list[FileEntry] = []
    tensors: dict[str, TensorEntry] = {}
    for rank, part in enumerate(parts):
        if part["facts_sha256"] != parts[0]["facts_sha256"]:
            raise IncompleteStateError(
                f"the facts of rank {rank} are not those of rank 0; all ranks must offer the same"
            )
        for name, offered in part["tensors"].items():
            known = tensors.setdefault(name, {"dtype": offered["dtype"], "shape": offered["shape"], "chunks": []})
            if (known["dtype"], known["shape"]) != (offered["dtype"], offered["shape"]):
                raise IncompleteStateError(
                    f"tensor {name} is {offered['dtype']} {offered['shape']} on rank {rank},"
                    f" {known['dtype']} {known['shape']} on a rank before it"
                )
            for chunk in offered["chunks"]:
                known["chunks"].append({**chunk, "file": len(files)})
        if part["file"] is not None:
            files.append(part["file"])
    for tensor in tensors.values():
        tensor["chunks"].sort(key=lambda chunk: chunk["offsets"])
    return files, tensors


def _check_size(path: Path, expected: int) -> None:
    """Raise StorageError unless rank 0 sees the file as the rank that wrote it did."""
    try:
        size = path.stat(follow_symlinks=False).st_size
    except OSError as exc:
        raise storage_error("find what a rank wrote to", path, exc) from exc
    if size != expected:
        raise StorageError(
            f"{path} has {size} bytes where its rank wrote {expected}: is run.dir on a shared file system?"
        )


def _parent(root: Path, step: int) -> str | None:
    """Return the manifest digest of the newest checkpoint before `step`, as far as it can be read."""
    for earlier, path in list_steps(root):
        if earlier < step:
            try:
                return read_manifest(path)[1]
            except DistLLMError:
                return None
    return None


def _plain_facts(facts: Mapping[str, object]) -> object:
    try:
        return plain(facts, "facts")
    except ValueError as exc:
        raise IncompleteStateError(f"the state cannot be saved: {exc}") from exc
