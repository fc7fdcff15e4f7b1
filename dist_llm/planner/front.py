"""Layouts by memory and time: the Pareto front, where none is both smaller and faster, and its picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDE = 4.0
"""Ratio of values from which an axis is marked at 1, 2, 3 and 5 of each power of ten."""

_INK, _MUTED, _FRONT, _CHOSEN = "#1f2933", "#a9b3bd", "#2f6fb2", "#c8553d"


@dataclass(frozen=True)
class Point:
    """A layout's memory on its fullest device, time of a step, and its name in a picture."""

    memory_gib: float
    step_seconds: float
    name: str = ""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both memory and time, by memory."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.memory_gib, each.step_seconds)):
        if not front or point.step_seconds < front[-1].step_seconds:
            front.append(point)
    return front


def draw_front(points: Sequence[Point], memory_gib: float, chosen: Point) -> bytes:
    """Return a PNG of all points, the front, the chosen one and the memory of a device."""
    # Imported here: they take half a second. No pyplot: it would open a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.scatter([p.memory_gib for p in points], [p.step_seconds for p in points], s=9, color=_MUTED, label="legal")
    front = pareto_front(points)
    axis.plot(
        [p.memory_gib for p in front],
        [p.step_seconds for p in front],
        marker="o",
        markersize=4,
        color=_FRONT,
        label="none is smaller and faster",
    )
    axis.scatter([chosen.memory_gib], [chosen.step_seconds], s=90, marker="*", color=_CHOSEN, zorder=3, label="chosen")
    axis.axvline(memory_gib, color=_CHOSEN, linestyle="--", linewidth=1, label=f"a device: {memory_gib:g} GiB")
    _name_points(axis, [*(point for point in front[:: max(1, len(front) // 6)] if point != chosen), chosen])
    axis.set_xscale("log")
    axis.set_yscale("log")
    _mark(axis.xaxis, [*(point.memory_gib for point in points), memory_gib])
    _mark(axis.yaxis, [point.step_seconds for point in points])
    axis.set_xlabel("memory of the fullest device, GiB", color=_INK)
    axis.set_ylabel("time of a step, seconds", color=_INK)
    axis.set_title(f"{len(points)} layouts: memory against time", loc="left", fontsize=10, color=_INK)
    axis.grid(visible=True, which="both", linewidth=0.3, color="#e4e8ec")
    axis.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _mark(axis: Any, values: Sequence[float]) -> None:
    """Mark a logarithmic axis in plain numbers, round ones where the values span enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    wide = max(values) > WIDE * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)) if wide else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_points(axis: Any, points: Sequence[Point]) -> None:
    for point in points:
        axis.annotate(
            point.name,
            (point.memory_gib, point.step_seconds),
            textcoords="offset points",
            xytext=(5, 5),
            fontsize=6,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )
