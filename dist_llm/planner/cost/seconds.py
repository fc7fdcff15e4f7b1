"""Seconds by what they are spent on, and work as forward, backward and what the backward computes again."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Seconds:
    """Device time by reason, in seconds, and beside it the host's time to issue it."""

    matmul: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    tensor_comm: float = 0.0
    context_comm: float = 0.0
    expert_comm: float = 0.0
    host: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*[getattr(self, name) + getattr(other, name) for name in _NAMES])

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(*[getattr(self, name) * factor for name in _NAMES])

    @property
    def device(self) -> float:
        """All device time, in seconds."""
        return (
            self.matmul + self.attention + self.memory_bound + self.tensor_comm + self.context_comm + self.expert_comm
        )


_NAMES = tuple(field.name for field in fields(Seconds))

REASONS = tuple(name for name in _NAMES if name != "host")
"""What device time is spent on."""


@dataclass(frozen=True)
class Passes:
    """Work on one microbatch: forward, backward, and the forward that the backward runs again."""

    forward: Seconds = Seconds()
    backward: Seconds = Seconds()
    again: Seconds = Seconds()

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    def __mul__(self, factor: float) -> Passes:
        return Passes(self.forward * factor, self.backward * factor, self.again * factor)
