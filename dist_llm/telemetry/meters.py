"""From a step's result and the clock to its record.

    tokens_per_second = tokens / step_seconds
    mfu = flops_per_token * tokens_per_second / peak_flops      (PaLM, Chowdhery et al. 2022, appendix B)

A record's tokens count from the run's first step; its rate is the step's own. flops_per_token is the one definition of
`accounting/flops.py` (forward and backward, causal attention as causal, no recompute); peak_flops is the dense peak of
all ranks together in the compute format.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dist_llm.types import StepRecord, StepResult


class Meter:
    """Times one step after another."""

    def __init__(
        self,
        flops_per_token: float,
        peak_flops: float | None,
        memory_gib: Callable[[], float],
        tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """peak_flops None: the hardware's peak is not known, so MFU is None. tokens: trained on before this process."""
        self.tokens = tokens
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._memory_gib = memory_gib
        self._clock = clock
        self._started = clock()

    def start(self) -> None:
        """Mark the beginning of a step: from here its waiting for data and its computing count."""
        self._started = self._clock()

    def stop(self, step: int, result: StepResult) -> StepRecord:
        """Return the record of the step that `start` began; the caller has waited for the device."""
        # Two reads of a coarse clock can be equal.
        seconds = max(self._clock() - self._started, 1e-9)
        rate = result.tokens / seconds
        self.tokens += result.tokens
        return StepRecord(
            step=step,
            tokens=self.tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            step_seconds=seconds,
            tokens_per_second=rate,
            mfu=None if self._peak_flops is None else self._flops_per_token * rate / self._peak_flops,
            memory_gib=self._memory_gib(),
            skipped=result.skipped,
            figures=result.figures,
        )
