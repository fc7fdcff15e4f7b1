"""Stop a run whose gradients stay non-finite: such a step is skipped and said so; too many in a row end the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dist_llm.errors import NumericsError
from dist_llm.types import StepRecord


@dataclass
class NumericsGuard:
    """Counts skipped steps in a row."""

    limit: int
    event: Callable[..., None]
    in_a_row: int = field(default=0)

    def after_step(self, record: StepRecord) -> None:
        """Note a skipped step; raise NumericsError after `limit` in a row (a hook of the loop)."""
        if not record.skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.event("skip", record.step, "the loss or the gradient is not finite")
        if self.in_a_row >= self.limit:
            error = NumericsError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (precision.max_skipped_steps="
                f"{self.limit}): lower optimizer.lr or raise the precision and resume; if that fails at once, the "
                "newest checkpoint holds ruined weights: delete that one if there is an older one, and resume again"
            )
            error.shared = True
            raise error
