"""Nouns shared by layers. Plain frozen data: no behaviour beyond arithmetic on the fields, no torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RUN_LOCK = ".dist-llm-run.lock"
"""File that marks the folder of a run: its writer holds a lock on it."""

IGNORE_INDEX = -100
"""Target value of a position that is not counted in the loss."""


class Style(Enum):
    """How a module of a single-device model may be split over the tp axis (Megatron-LM, Shoeybi et al. 2019)."""

    REGION = "region"
    """A module whose input enters the tensor-parallel region once (Megatron's f)."""
    COLUMN = "column"
    """Linear split over output features; input replicated, output split."""
    ROW = "row"
    """Linear split over input features; output is summed over tp (Megatron's g)."""
    PARTIAL_ROW = "partial_row"
    """Linear split over input features; its output stays partial until a LEAVE."""
    LEAVE = "leave"
    """A module whose input is partial; its output is summed over tp."""
    EXPERT_COLUMN = "expert_column"
    """Matrices of experts split over experts (ep) and output features."""
    EXPERT_ROW = "expert_row"
    """Matrices of experts split over experts (ep) and input features; the output stays partial until a LEAVE."""
    VOCAB = "vocab"
    """Embedding table split over the vocabulary; output is summed over tp."""
    HEAD = "head"
    """Output projection split over the vocabulary; logits stay split."""
    POSITION = "position"
    """Replicated table looked up by position; under sequence parallelism each rank keeps its slice of the output."""
    HEADWISE = "headwise"
    """Replicated weight applied by each rank to its own part (QK-norm, router): its gradient is partial over tp."""
    TOKENWISE = "tokenwise"
    """Acts on each token alone (norms); under sequence parallelism its gradient is partial over tp."""


ShardPlan = Mapping[str, Style]
"""Module path pattern (`layers.*.attention.wq`) to the way it may be split."""


@dataclass(frozen=True)
class Recomputable:
    """A function that a backward may run again: attribute `function` of the modules of a block that match `module`.

    gives_up: its result is not kept either where another operation saves it, as a linear does its input.
    """

    module: str
    function: str
    gives_up: bool = False


RecomputePlan = Mapping[str, Recomputable]
"""Operator to what computes it."""


@dataclass(frozen=True)
class DataSlice:
    """Which share of every global batch a process reads: part `index` of `count` equal contiguous parts."""

    index: int
    count: int


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch; B sequences of T tokens.

    tokens, targets: int64 [B, T]; targets are IGNORE_INDEX where not counted.
    samples: int64 [B], the global position of each sequence in the run (step * global_batch + row).
    documents: int64 [B, T] document number inside its sequence, or None when attention is plainly causal.
    """

    step: int
    tokens: Tensor
    targets: Tensor
    samples: Tensor
    documents: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank. figures: more that a person watches, by name."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossSum:
    """Sum of token losses (nats) and the number of counted tokens, over the whole global batch."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl, with `figures` as further values of it.

    `tokens` counts from the start of the run; mfu: fraction of dense peak, or None.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    memory_gib: float
    skipped: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float | bool | None]:
        """Return all of it by name."""
        own = {name: value for name, value in vars(self).items() if name != "figures"}
        return {**own, **self.figures}


@dataclass(frozen=True)
class TensorShard:
    """The rectangle of a logical tensor that this rank holds.

    shape is the layout-free global shape (padding stripped); data is the local tensor of the rectangle
    [offsets, offsets + data.shape) and shares storage with the live state, so a load writes in place.
    primary says that this rank is the one among equal replicas that writes it.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor
    primary: bool


@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds: tensors by logical name and JSON-able facts (step, scaler, data position, ...)."""

    tensors: tuple[TensorShard, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
