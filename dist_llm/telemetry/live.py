"""The line that a person watches: where the run is, how it does, how long it will take.

    step  120/300 ━━━━━━━━╸━━━━━━━━━━━ loss 3.2145  grad 0.832  lr 2.90e-04  12.3k tok/s  MFU 41.2%  ETA 1:23

On a terminal one line is drawn over and over (rich); elsewhere plain lines, the first, the last and at most one a
second between them, every ten steps or five seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_llm.types import StepRecord

_PLAIN_STEPS = 10
_PLAIN_SECONDS = 5.0
_PLAIN_LEAST_SECONDS = 1.0
_BAR_FROM_WIDTH, _RATE_FROM_WIDTH = 115, 95
"""Columns from which a terminal shows the bar, and the learning rate."""
_RECENT = 0.1
"""Weight of the newest step in the mean step time that the ETA uses."""


class LiveLine:
    """A hook that shows each step; use it as a context manager, so that the terminal is left in order."""

    def __init__(
        self,
        total_steps: int,
        log_interval: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total_steps is where the run ends; only steps that are multiples of log_interval are shown (and the ends)."""
        self._total = total_steps
        self._interval = log_interval
        self._console = console if console is not None else Console(stderr=True, highlight=False, soft_wrap=True)
        self._clock = clock
        self._seconds: float | None = None
        self._shown_at = -math.inf
        self._shown_step: int | None = None
        self._live: Live | None = None

    def __call__(self, record: StepRecord) -> None:
        """Show one step."""
        old = self._seconds
        # The first step warms caches and kernels up; it seeds the mean and soon weighs nothing.
        self._seconds = record.step_seconds if old is None else old + _RECENT * (record.step_seconds - old)
        at_an_end = self._shown_step is None or record.step >= self._total
        if record.step % self._interval and not at_an_end:
            return
        if self._console.is_terminal:
            self._draw(record)
        elif at_an_end or self._due(record.step):
            self._console.print(self._text(record, with_total=True), crop=False)
            self._shown_at = self._clock()
            self._shown_step = record.step

    def close(self) -> None:
        """Leave the last line standing and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _due(self, step: int) -> bool:
        since = self._clock() - self._shown_at
        steps = step - (self._shown_step or 0)
        return since >= _PLAIN_SECONDS or (steps >= _PLAIN_STEPS and since >= _PLAIN_LEAST_SECONDS)

    def _draw(self, record: StepRecord) -> None:
        self._shown_step = record.step
        row: RenderableType
        if self._console.width >= _BAR_FROM_WIDTH:
            bar = ProgressBar(total=max(self._total, 1), completed=record.step, width=20)
            row = Table.grid(padding=(0, 1))
            row.add_row(_position(record.step, self._total), bar, self._text(record, with_total=False))
        else:
            row = self._text(record, with_total=True)
            row.truncate(self._console.width, overflow="ellipsis")
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=8)
            self._live.start()
        self._live.update(row)

    def _text(self, record: StepRecord, with_total: bool) -> Text:
        parts = [
            ("loss", format_number(record.loss, ".4f"), "bold"),
            ("grad", format_number(record.grad_norm, ".3f"), ""),
            ("lr", format_number(record.lr, ".2e"), ""),
        ]
        if self._console.is_terminal and self._console.width < _RATE_FROM_WIDTH:
            parts.pop()
        text = _position(record.step, self._total) if with_total else Text()
        for name, value, style in parts:
            text.append("  " if text else "").append(f"{name} ", style="dim").append(value, style=style)
        text.append(f"  {format_rate(record.tokens_per_second)} tok/s")
        if record.mfu is not None:
            text.append("  MFU ", style="dim").append(f"{100 * record.mfu:.1f}%")
        remaining = (self._seconds or 0.0) * max(0, self._total - record.step)
        text.append("  ETA ", style="dim").append(format_duration(remaining))
        if record.skipped:
            text.append("  step skipped: gradients not finite", style="bold red")
        return text


def format_number(value: float, form: str) -> str:
    """Return a number by its format; what is not finite as nan or inf, never as an error."""
    return format(value, form) if math.isfinite(value) else str(value)


def format_rate(value: float) -> str:
    """Return a rate in three to four digits with its prefix: 950, 12.3k, 4.56M."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{prefix}"
    return f"{value:.0f}" if math.isfinite(value) else str(value)


def format_duration(seconds: float) -> str:
    """Return a length of time as 0:07, 12:34, 3:25:45 or 2d 03:04."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _position(step: int, total: int) -> Text:
    return Text.assemble(("step ", "dim"), f"{step:>{len(str(total))}}/{total}")
