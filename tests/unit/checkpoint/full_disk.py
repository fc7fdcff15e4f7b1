"""Save on a file system that is too small: a tmpfs of this process's own, or a limit on the size of a file."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from dist_llm.checkpoint.inspect import verify
from dist_llm.checkpoint.save import save
from dist_llm.errors import DistLLMError
from tests.unit.checkpoint.synthetic import small_state, split

LIMIT_BYTES = 256 * 1024


def main(folder: Path, kind: str) -> None:
    """Save one that fits and one that does not; print what happened as JSON."""
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LIMIT_BYTES}", "tmpfs", str(folder)], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    root = folder / "checkpoints"
    save(root, 1, small_state(1.0))
    error = "none"
    try:
        save(root, 2, split({"large": torch.ones(LIMIT_BYTES)}, "one")[0])
    except DistLLMError as exc:
        error = f"{type(exc).__name__}: {exc}"
    left = sorted(entry.name for entry in root.iterdir())
    print(json.dumps({"error": error, "names": left, "verify": verify(root / "step-00000001")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
