"""The run's scalars as TensorBoard events under `<run>/tensorboard/`."""

from __future__ import annotations

from pathlib import Path

from dist_llm.types import StepRecord

_SCALARS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "mfu": "speed/mfu",
    "memory_gib": "speed/memory_gib",
}


class TensorBoard:
    """A hook that writes each step's scalars; one process of the run has it."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open an event file; what an earlier run wrote for `first_step` and after it is hidden by TensorBoard."""
        # Imported here: it takes half a second, and a run without TensorBoard does not need it.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def __call__(self, record: StepRecord) -> None:
        """Write one step; a value that is not known (mfu without a peak) is left out."""
        values = record.values()
        for field, tag in {**_SCALARS, **{name: f"router/{name}" for name in record.figures}}.items():
            if values[field] is not None:
                self._writer.add_scalar(tag, values[field], record.step)

    def validation(self, step: int, loss: float) -> None:
        """Write the mean validation loss (nats a token)."""
        self._writer.add_scalar("validation/loss", loss, step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a text, shown as it is."""
        self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)

    def close(self) -> None:
        """Write out what is queued and close the file."""
        self._writer.close()
