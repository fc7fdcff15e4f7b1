"""The loss curve of a run as `loss.png`: every step and its smoothed course, gradient norm and learning rate below.

The course at step i is the mean of the finite losses at i - h .. i + h, and of fewer where the run begins or ends:
unlike an exponential mean it does not lag behind a falling loss. A step without a finite value is a gap.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_llm.telemetry.records import (
    EVENTS_FILE,
    VALIDATION_FILE,
    MetricsLine,
    read_lines,
    read_metrics,
    write_whole,
)

PICTURE_FILE = "loss.png"

_INK, _MUTED, _GRID = "#1f2933", "#6b7785", "#e4e8ec"
_LOSS, _VALIDATION, _NORM, _RATE = "#1f5fbf", "#c2571a", "#5b7f3a", "#7a4fa3"
_MARKED_EVENTS = {"resume": "#6b7785", "fault": "#b3261e", "rollback": "#b3261e", "skip": "#b3261e"}


def draw_loss_curve(run_dir: Path) -> Path:
    """Draw what metrics.jsonl holds into `<run_dir>/loss.png` (1500 x 1000 pixels) and return its path.

    Raises StorageError where the file cannot be written; a run without steps gives a picture that says so.
    """
    # Imported here: they take half a second, and drawing happens once a run. No pyplot: it would open a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _GRID,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "axes.grid": True,
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }
    with rc_context(style):
        figure = Figure(figsize=(10, 20 / 3), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(3, 1, height_ratios=[5, 1.5, 1.5], hspace=0.12, left=0.085, right=0.97, top=0.89)
        axes = [figure.add_subplot(grid[0])]
        axes += [figure.add_subplot(grid[row], sharex=axes[0]) for row in (1, 2)]
        steps = read_metrics(run_dir)
        _draw_loss(axes[0], steps, run_dir)
        _draw_line(axes[1], steps, [line.grad_norm for line in steps], _NORM, "grad norm")
        _draw_line(axes[2], steps, [line.lr for line in steps], _RATE, "lr")
        axes[2].yaxis.set_major_formatter(lambda value, _: _rate_label(value))
        axes[2].set_xlabel("step")
        for axis in axes[:2]:
            axis.tick_params(labelbottom=False)
        if steps:
            axes[0].set_xlim(steps[0].step - 0.5, steps[-1].step + 0.5)
        _write_heading(figure, run_dir.name, steps)
        figure.align_ylabels(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    path = run_dir / PICTURE_FILE
    write_whole(path, buffer.getvalue())
    return path


def smooth(values: Sequence[float | None], half: int) -> list[float]:
    """Return the mean of the known values at i - half .. i + half for every i; NaN where value i is None."""
    course = []
    for index, value in enumerate(values):
        near = [other for other in values[max(0, index - half) : index + half + 1] if other is not None]
        course.append(math.nan if value is None else sum(near) / len(near))
    return course


def _draw_loss(axis: Any, steps: list[MetricsLine], run_dir: Path) -> None:
    """Draw the loss of every step, its course, validation losses, and thin lines where something happened."""
    axis.set_ylabel("loss (nats a token)")
    if not any(line.loss is not None for line in steps):
        axis.text(0.5, 0.5, "no steps yet", transform=axis.transAxes, ha="center", va="center", color=_MUTED)
        return
    numbers = [line.step for line in steps]
    losses = [line.loss for line in steps]
    half = max(1, min(25, len(steps) // 40))
    axis.plot(numbers, _gaps(losses), color=_LOSS, alpha=0.3, linewidth=0.9, label="each step")
    axis.plot(numbers, smooth(losses, half), color=_LOSS, linewidth=2, label=f"mean of {2 * half + 1} steps")
    checks = [line for line in read_lines(run_dir / VALIDATION_FILE) if line.get("loss") is not None]
    if checks:
        across, up = [line["step"] for line in checks], [line["loss"] for line in checks]
        axis.plot(
            across, up, color=_VALIDATION, marker="o", markersize=4, linewidth=1.2, label="validation", clip_on=False
        )
    labelled: set[str] = set()
    for event in read_lines(run_dir / EVENTS_FILE):
        kind = event.get("kind")
        if kind in _MARKED_EVENTS and isinstance(event.get("step"), int):
            label = None if kind in labelled else kind
            axis.axvline(event["step"], color=_MARKED_EVENTS[kind], linewidth=0.9, linestyle=(0, (3, 3)), label=label)
            labelled.add(kind)
    axis.legend(frameon=False, loc="upper right", labelcolor=_INK)


def _draw_line(axis: Any, steps: list[MetricsLine], values: list[float | None], color: str, name: str) -> None:
    """Draw one quantity from zero upwards."""
    axis.plot([line.step for line in steps], _gaps(values), color=color, linewidth=1.2)
    axis.set_ylabel(name)
    # A few early spikes must not press the rest of the curve onto the axis.
    known = sorted(value for value in values if value is not None)
    if known:
        axis.set_ylim(0, 1.15 * max(known[-1 - len(known) // 100], 1e-12))


def _write_heading(figure: Any, name: str, steps: list[MetricsLine]) -> None:
    """Write the run's name and, in one sentence, what its loss did."""
    figure.text(0.085, 0.955, name, fontsize=15, fontweight="bold", va="center")
    losses = [line.loss for line in steps if line.loss is not None]
    if not losses:
        return
    last = losses[-20:]
    mean = sum(last) / len(last)
    sentence = (
        f"loss {losses[0]:.3f} at step {steps[0].step}, {mean:.3f} over the last {len(last)} of {len(steps)} steps"
    )
    figure.text(0.085, 0.917, sentence, fontsize=10.5, color=_MUTED, va="center")


def _rate_label(value: float) -> str:
    """Return a learning rate as 0 or 2.5e-4."""
    digits, _, exponent = f"{value:.3e}".partition("e")
    return "0" if value == 0 else f"{float(digits):g}e{int(exponent)}"


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
