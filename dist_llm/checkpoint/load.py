"""Load: fill a state, however it is split, from whichever saved rectangles overlap it.

    saved    |----0----|----1----|         each saved rectangle that is needed is read once, hashed,
    wanted   |--A--|--B--|--C--|-D-|       and only then copied to every wanted rectangle it overlaps
The arithmetic of overlaps is torch.distributed.checkpoint's planner; reading is ours, by manifest.
Invariant: all ranks return or all raise; a mismatch is raised before any tensor is touched.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dist_llm.checkpoint.agreement import Channel, connect, each, lead
from dist_llm.checkpoint.inspect import damage, open_saved, read_manifest
from dist_llm.checkpoint.manifest import Chunk, Manifest, SavedTensor, chunk_bytes, start_chunk_digest
from dist_llm.checkpoint.storage import FileReader, list_steps
from dist_llm.checkpoint.strict_json import dump, plain
from dist_llm.checkpoint.tensors import DTYPE_NAMES, bytes_of, check_shards, empty_bytes, rectangle_of
from dist_llm.errors import CheckpointError, CheckpointMismatch, StorageError, Violation
from dist_llm.types import TensorShard, TrainState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class View(TypedDict):
    """What one rank sees before a load: the manifest's digest, the tensors it asks for and which of them do not fit."""

    digest: str
    names: list[str]
    rows: list[tuple[str, str, str]]


def find_latest(
    root: Path,
    group: ProcessGroup | None = None,
    *,
    verify: Literal["full", "manifest"] = "full",
    report: Callable[[str], None] | None = None,
) -> Path | None:
    """Return the newest committed checkpoint under `root` that is sound; None when none was ever committed.

    The ranks share the hashing of the files ("full") or read the manifest only. Damaged ones are passed over and
    reported on rank 0; CheckpointError when there are checkpoints and none is sound, so that a run never starts over
    in silence. Collectives over `group` (CPU): one broadcast, then two broadcasts and a gather for each candidate.
    """
    return find_latest_over(connect(group), root, verify, report)


def load(
    path: Path, state: TrainState, group: ProcessGroup | None = None, *, partial: bool = False
) -> dict[str, object]:
    """Fill every tensor of `state` in place from the checkpoint at `path` and return its facts; every rank calls it.

    Any saved layout fits any wanted one. CheckpointMismatch lists every tensor that is missing on either side or has
    another shape or dtype, before anything is written; `partial` lets the checkpoint hold more than is asked for.
    CheckpointError names file and tensor of damage: every rank raises it and the state is then part old, part new,
    and must be loaded again or dropped. Collectives over `group` (CPU): 2 gathers, 3 broadcasts.
    """
    return load_over(connect(group), path, state, partial=partial)


def find_latest_over(
    channel: Channel, root: Path, verify: Literal["full", "manifest"], report: Callable[[str], None] | None
) -> Path | None:
    """Find through a channel; see `find_latest`."""
    tell = report or logging.getLogger(__name__).warning
    names = lead(channel, lambda: [path.name for _, path in list_steps(root)])
    refused = []
    for name in names:
        problem = shared_problem(channel, root / name, verify)
        if problem is None:
            return root / name
        refused.append(f"{name}: {problem}")
        if channel.rank == 0:
            tell(f"checkpoint {root / name} is passed over: {problem}")
    if refused:
        raise CheckpointError("\n  ".join([f"no checkpoint under {root} is sound:", *refused]))
    return None


def load_over(channel: Channel, path: Path, state: TrainState, *, partial: bool) -> dict[str, object]:
    """Load through a channel; see `load`."""
    manifests: list[Manifest] = []

    def compare() -> View:
        check_shards(state.tensors)
        manifest, digest = read_manifest(path)
        manifests.append(manifest)
        rows = [(item.key, str(item.value), item.rule) for item in mismatches(manifest, state.tensors)]
        return {"digest": digest, "rows": rows, "names": sorted({shard.name for shard in state.tensors})}

    views = each(channel, compare)
    lead(channel, lambda: _require_match(path, manifests[0], views, partial))
    each(channel, lambda: fill(path, manifests[0], state.tensors))
    return dict(manifests[0].facts)


def mismatches(manifest: Manifest, shards: Iterable[TensorShard]) -> list[Violation]:
    """Return a violation for every tensor that the checkpoint lacks or holds with another shape or dtype."""
    found: dict[str, Violation] = {}
    for shard in shards:
        wanted = _described(DTYPE_NAMES[shard.data.dtype], shard.shape)
        saved = manifest.tensors.get(shard.name)
        if saved is None:
            found[shard.name] = Violation(shard.name, wanted, "is not in the checkpoint")
        elif _described(saved.dtype, saved.shape) != wanted:
            rule = f"is {_described(saved.dtype, saved.shape)} in the checkpoint"
            found[shard.name] = Violation(shard.name, wanted, rule)
    return [found[name] for name in sorted(found)]


def fill(path: Path, manifest: Manifest, shards: Sequence[TensorShard]) -> None:
    """Copy into every shard, in place, the saved elements of its rectangle; no collectives.

    Each saved rectangle that is needed is read and hashed once; the largest one is the memory it takes.
    """
    by_name: dict[str, list[TensorShard]] = defaultdict(list)
    for shard in shards:
        if shard.data.numel():
            by_name[shard.name].append(shard)
    reads: dict[int, list[tuple[Chunk, str, list[ReadItem]]]] = defaultdict(list)
    for name, wanted in by_name.items():
        for chunk, items in plan_reads(name, manifest.tensors[name], wanted):
            reads[chunk.file].append((chunk, name, items))
    for index in sorted(reads):
        with open_saved(path, manifest.files[index]) as reader:
            for chunk, name, items in sorted(reads[index], key=lambda read: read[0].start):
                content = _read_checked(reader, manifest, name, chunk)
                _copy(rectangle_of(content, manifest.tensors[name].dtype, chunk.shape), items, by_name[name])


def plan_reads(name: str, saved: SavedTensor, wanted: Sequence[TensorShard]) -> list[tuple[Chunk, list[ReadItem]]]:
    """Return, for each saved rectangle that overlaps a wanted one, the overlaps; they cover the wanted ones whole."""
    metadata = TensorStorageMetadata(
        properties=TensorProperties(),
        size=torch.Size(saved.shape),
        chunks=[ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)) for chunk in saved.chunks],
    )
    local = [ChunkStorageMetadata(torch.Size(shard.offsets), shard.data.shape) for shard in wanted]
    grouped: dict[int, list[ReadItem]] = defaultdict(list)
    for item in create_read_items_for_chunk_list(name, metadata, local):
        grouped[_index(item.storage_index.index)].append(item)
    covered = sum(prod(item.lengths) for items in grouped.values() for item in items)
    if covered != sum(shard.data.numel() for shard in wanted):
        raise CheckpointError(f"tensor {name}: the saved rectangles do not cover what this rank holds of it")
    return [(saved.chunks[index], grouped[index]) for index in sorted(grouped)]


def require_equal(channel: Channel, path: Path, state: TrainState) -> None:
    """Raise CheckpointError on every rank unless the checkpoint at `path` holds exactly this state, bit for bit."""

    def differences() -> list[str]:
        manifest, _ = read_manifest(path)
        found = [str(violation) for violation in mismatches(manifest, state.tensors)]
        if not found and dump(plain(state.facts, "facts")) != dump(manifest.facts):
            found.append("facts")
        if not found:
            found.extend(_changed(path, manifest, state.tensors))
        return found

    reports = each(channel, differences)

    def judge() -> None:
        names = sorted({name for report in reports for name in report})
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(
                f"{path} is already there with another state ({shown}); a committed checkpoint is never overwritten:"
                " move it away or use another run.name"
            )

    lead(channel, judge)


def _changed(path: Path, manifest: Manifest, shards: Sequence[TensorShard]) -> list[str]:
    """Return the names of this rank's primary tensors whose bits differ from the checkpoint."""
    names = []
    for shard in shards:
        if shard.primary and shard.data.numel():
            saved = torch.empty(shard.data.shape, dtype=shard.data.dtype)
            fill(path, manifest, [TensorShard(shard.name, shard.shape, shard.offsets, saved, primary=True)])
            if bytes_of(saved) != bytes_of(shard.data):
                names.append(shard.name)
    return names


def shared_problem(channel: Channel, path: Path, verify: Literal["full", "manifest"] = "full") -> str | None:
    """Return why a checkpoint is not sound, each rank hashing its share of the files; the same on every rank."""

    def look() -> list[str]:
        try:
            manifest, _ = read_manifest(path)
        except CheckpointError as exc:
            return [str(exc)]
        return damage(path, manifest, part=channel.rank, parts=channel.size) if verify == "full" else []

    reports = each(channel, look)
    return lead(channel, lambda: next((problem for report in reports for problem in report), None))


def _require_match(path: Path, manifest: Manifest, views: list[View], partial: bool) -> None:
    """Raise CheckpointMismatch with what any rank found, and what the checkpoint holds that no rank asked for."""
    if len({view["digest"] for view in views}) > 1:
        raise StorageError(f"the ranks see different checkpoints at {path}: is run.dir on a shared file system?")
    found: dict[str, Violation] = {}
    asked: set[str] = set()
    for view in views:
        asked.update(view["names"])
        found.update({key: Violation(key, value, rule) for key, value, rule in view["rows"]})
    for name in () if partial else manifest.tensors.keys() - asked:
        saved = manifest.tensors[name]
        rule = f"is not in this run, but in the checkpoint as {_described(saved.dtype, saved.shape)}"
        found[name] = Violation(name, None, rule)
    if found:
        raise CheckpointMismatch([found[name] for name in sorted(found)])


def _read_checked(reader: FileReader, manifest: Manifest, name: str, chunk: Chunk) -> torch.Tensor:
    """Return the bytes of a saved rectangle (uint8 [n]) after their digest was found right."""
    saved = manifest.tensors[name]
    content, view = empty_bytes(chunk_bytes(saved, chunk))
    reader.read_into(chunk.start, view)
    digest = start_chunk_digest(manifest.step, name, saved.dtype, saved.shape, chunk.offsets, chunk.shape)
    digest.update(view)
    if digest.hexdigest() != chunk.sha256:
        raise CheckpointError(
            f"checkpoint file {reader.path} is damaged: tensor {name} at {list(chunk.offsets)} fails its sha256"
        )
    return content


def _copy(saved: torch.Tensor, items: list[ReadItem], wanted: list[TensorShard]) -> None:
    """Copy each overlap out of a saved rectangle into the shard that wants it."""
    with torch.no_grad():
        for item in items:
            source, target = saved, wanted[_index(item.dest_index.index)].data.detach()
            for dim, length in enumerate(item.lengths):
                source = source.narrow(dim, item.storage_offsets[dim], length)
                target = target.narrow(dim, item.dest_offsets[dim], length)
            target.copy_(source)


def _described(dtype: str, shape: Iterable[int]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _index(index: int | None) -> int:
    assert index is not None  # the planner always gives the position in the lists that it was handed
    return index
