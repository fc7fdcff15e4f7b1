"""Weights & Biases as a tracker: the same scalars as TensorBoard, sent by the user's own account and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_llm.types import StepRecord


class WandB:
    """A hook that logs each step; one process of the run has it. Whether it uploads is wandb's own setting."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Open a run named after its folder, resuming the same one after an interruption."""
        # Imported here: an optional extra.
        import wandb

        name, place = run_dir.name, hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()
        self._run = wandb.init(
            project="dist_llm", name=name, id=place[:16], resume="allow", dir=str(run_dir), config=dict(config)
        )

    def __call__(self, record: StepRecord) -> None:
        """Log one step; a value that is not known is left out."""
        values = {key: value for key, value in record.values().items() if value is not None and key != "step"}
        self._run.log(values, step=record.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
