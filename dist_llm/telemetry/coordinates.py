"""A coordinate check as a picture: a column a kind of layer, muP above and the standard parametrisation below.

Each line is a step of training; across is the width, up how far outputs moved since the start. Level lines do not
depend on the width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INK, _MUTED, _GRID, _BAD = "#1f2933", "#6b7785", "#e4e8ec", "#b3261e"
_ROWS = {"mup": "muP", "standard": "standard"}

FORMATS = {".png": "png", ".svg": "svg"}
"""The picture formats by the ending of a file's name."""


def draw_coordinates(facts: Mapping[str, Any], path: Path) -> bytes:
    """Return the picture of what `verify coordinates` found, in the format that the name of `path` ends with."""
    # Imported here: they take half a second. No pyplot: it would open a display.
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 9, "text.color": _INK, "axes.edgecolor": _GRID, "svg.hashsalt": "dist_llm"}
    with rc_context(style):
        kinds = facts["kinds"]
        figure = Figure(figsize=(1.2 + 2.2 * len(kinds), 6.2), dpi=120, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(_ROWS), len(kinds), sharex=True, sharey="col", squeeze=False)
        steps = range(1, facts["steps"] + 1)
        colours = [colormaps["viridis"](0.9 * (step - 1) / max(1, len(steps) - 1)) for step in steps]
        for column, kind in enumerate(kinds):
            for row, name in enumerate(_ROWS):
                _draw_panel(axes[row][column], facts["figures"], kind, name, list(zip(steps, colours, strict=True)))
        for row, words in enumerate(_ROWS.values()):
            axes[row][0].set_ylabel(f"{words}\nmean |change| since the start", color=_MUTED)
        verdict = "muP holds" if facts["ok"] else "muP does NOT hold"
        figure.suptitle(
            f"Coordinate check: {verdict}   (base width {facts['base_width']}, learning rate {facts['lr']:g}, "
            f"slope after step {facts['steps']} over each panel)",
            x=0.02,
            ha="left",
            fontsize=12,
        )
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=min(10, len(labels)), frameon=False)
        figure.tight_layout(rect=(0.01, 0.05, 1, 0.98))
        buffer = io.BytesIO()
        plain = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(buffer, format=FORMATS[path.suffix], metadata=plain)
    return buffer.getvalue()


def _draw_panel(
    axis: Any, figures: Sequence[Mapping[str, Any]], kind: Mapping[str, Any], name: str, steps: list[tuple[int, Any]]
) -> None:
    """Draw the change of a kind of layer over width, a line a step, under its slope and in red where out of bounds."""
    chosen = [row for row in figures if (row["parametrisation"], row["kind"]) == (name, kind["kind"])]
    for step, colour in steps:
        line = [row for row in chosen if row["step"] == step]
        up = [math.nan if row["change"] is None else row["change"] for row in line]
        across = [row["width"] for row in line]
        axis.plot(across, up, color=colour, marker="o", markersize=3, linewidth=1.3, label=f"step {step}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    widths = sorted({row["width"] for row in chosen})
    axis.set_xticks(widths, [str(width) for width in widths], color=_MUTED)
    axis.minorticks_off()
    axis.tick_params(labelsize=8, colors=_MUTED, length=0)
    axis.grid(color=_GRID)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    colour = _INK if kind[f"{name}_ok"] else _BAD
    words = kind["kind"].replace("_", " ")
    slope = kind[f"{name}_change"]
    shown = "no slope" if slope is None else f"{slope:+.2f}"
    axis.set_title(f"{words}: {shown}", fontsize=9.5, color=colour, loc="left")
    if name == list(_ROWS)[-1]:
        axis.set_xlabel("width", color=_MUTED)
