"""Keep the newest checkpoints, and never delete the last one that can be loaded. No torch.

Invariant: before anything is deleted one of those that stay has had its every byte checked.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from dist_llm.checkpoint.inspect import list_checkpoints, verify
from dist_llm.checkpoint.storage import remove_committed, sync_directory


def sound_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints under `root` whose manifest is sound, newest first."""
    return [Path(str(row["path"])) for row in list_checkpoints(root) if row["problem"] is None]


def prune(root: Path, keep: int, checked: Path | None = None, rejected: Set[Path] = frozenset()) -> list[Path]:
    """Delete all but the `keep` newest sound checkpoints under `root`; return what was deleted. One rank calls it.

    checked: one whose every byte the caller has checked; without it, or when it is not among those to be kept, they
    are read here until one is found sound. What is seen to be damaged, and `rejected` of which the caller has seen it,
    neither counts nor is deleted: it is for a person to look into. When none of those to be kept verifies in full
    nothing is deleted. StorageError if a deletion fails; what is half deleted has lost its name.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint is kept")
    sound = [path for path in sound_checkpoints(root) if path not in rejected]
    kept, doomed = sound[:keep], sound[keep:]
    if not doomed or (checked not in kept and all(verify(path) for path in kept)):
        return []
    for path in reversed(doomed):
        remove_committed(path)
    sync_directory(root)
    return doomed
