"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018): halve on overflow, double after a run of good steps."""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.config.training import PrecisionConfig


@dataclass
class LossScale:
    """The factor on the loss before backward; 1 for every format but fp16."""

    value: float
    window: int
    good_steps: int = 0

    @classmethod
    def build(cls, precision: PrecisionConfig) -> LossScale:
        """Return the scale to start with."""
        return cls(precision.initial_loss_scale if precision.name == "fp16" else 1.0, precision.loss_scale_window)

    def update(self, finite: bool, dynamic: bool) -> None:
        """Adjust after a step; nothing moves unless dynamic."""
        if not dynamic:
            return
        if not finite:
            self.value, self.good_steps = max(self.value / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps >= self.window:
            self.value, self.good_steps = self.value * 2, 0
