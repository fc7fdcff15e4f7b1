"""Bytes of a rank by what they are for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Components:
    """Bytes of one rank, or of one of its stages, at the moment when it holds the most.

    parameters: stored, shards and masters among them. gathered: whole copies beside them. activations: what waits for
    its backward (of our own model also what is being computed). working: what a backward makes for a moment, a
    recomputed layer among it. logits: those of the last stage and what the loss makes of them. buffers: what crosses
    between pipeline ranks. communication: buckets on their way. workspace: of matrix libraries. fragmentation: what the
    allocator keeps and cannot give. reserve: the device's context and the communication library's buffers. not_at_once:
    below 0, what of the others is never there at the same moment.
    """

    parameters: int = 0
    gathered: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    working: int = 0
    logits: int = 0
    buffers: int = 0
    communication: int = 0
    workspace: int = 0
    fragmentation: int = 0
    reserve: int = 0
    not_at_once: int = 0

    @property
    def static(self) -> int:
        """Bytes that stay from step to step: parameters, gradients, optimizer state and workspace."""
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.workspace

    @property
    def allocated(self) -> int:
        """Bytes in tensors, what torch.cuda.max_memory_allocated says."""
        return self.reserved - self.fragmentation - self.reserve

    @property
    def reserved(self) -> int:
        """Bytes of the device in use, what nvidia-smi says."""
        return sum(self.by_name().values())

    def by_name(self) -> dict[str, int]:
        """Return bytes by component."""
        return dict(vars(self))

    def having(self, **sizes: int) -> Components:
        """Return the same with other sizes of some components."""
        return Components(**(vars(self) | sizes))

    @property
    def largest(self) -> str:
        """The component that is the largest."""
        sizes = self.by_name()
        return max(sizes, key=lambda name: sizes[name])


def total(rows: Iterable[Components]) -> Components:
    """Return the components of several stages together."""
    return Components(*(sum(column) for column in zip(*(vars(row).values() for row in rows), strict=True)))
