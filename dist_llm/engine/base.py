"""The protocol that every engine fulfils. Metrics, cadence and files are outside; all that moves weights is inside."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from dist_llm.types import Batch, DataSlice, LossSum, StepResult, TrainState


@runtime_checkable
class Engine(Protocol):
    """One optimizer step on one global batch, however the model is split."""

    data_slice: DataSlice
    """Which share of the global batch this process reads."""

    def train_step(self, batch: Batch) -> StepResult:
        """Update the weights by this rank's share of a global batch; the result is equal on all ranks."""
        ...

    def eval_step(self, batch: Batch) -> LossSum:
        """Return the loss of a global batch without updating anything; equal on all ranks."""
        ...

    def state(self) -> TrainState:
        """Return this rank's rectangles of all state, sharing storage with it, and the JSON-able facts."""
        ...

    def restore(self, facts: dict[str, object]) -> None:
        """Take over the facts of a checkpoint whose tensors were loaded in place into `state()`."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
