"""Keep the newest checkpoints, and never delete the last one that can be loaded. No torch.

Invariant: before anything is deleted one of those that stay has had its every byte checked.
"""

from __future__ import annotations

from pathlib import Path

from dist_llm.checkpoint.inspect import list_checkpoints, verify
from dist_llm.checkpoint.storage import remove_committed, sync_directory


def prune(root: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest sound checkpoints under `root`; return what was deleted. One rank calls it.

    Damaged ones neither count nor are deleted: they are for a person to look into. When none of those to be kept
    verifies in full nothing is deleted. StorageError if a deletion fails; what is half deleted has lost its name.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint is kept")
    sound = [Path(str(row["path"])) for row in list_checkpoints(root) if row["problem"] is None]
    doomed = sound[keep:]
    if not doomed or all(verify(path) for path in sound[:keep]):
        return []
    for path in reversed(doomed):
        remove_committed(path)
    sync_directory(root)
    return doomed
