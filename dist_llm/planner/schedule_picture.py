"""A schedule as a picture: a row a rank, a box an action, white where it idles; below, microbatches in flight."""

from __future__ import annotations

import io
from typing import Any

from dist_llm.accounting.schedules import Work
from dist_llm.planner.schedule_trace import Trace

_INK, _MUTED = "#1f2933", "#6b7785"
_COLOURS = {
    Work.FORWARD: ("#8fb8ea", "#c9ddf6"),
    Work.BACKWARD: ("#7fb069", "#bcd9ae"),
    Work.INPUT: ("#e0a458", "#f3d6ab"),
    Work.WEIGHT: ("#b98cc9", "#dfc9e6"),
}
_NAMES = {
    Work.FORWARD: "forward",
    Work.BACKWARD: "backward",
    Work.INPUT: "backward of inputs",
    Work.WEIGHT: "backward of weights",
}


def draw_schedule(trace: Trace) -> bytes:
    """Return a PNG of the trace, 1500 pixels wide. Later chunks of a rank are paler."""
    # Imported here: they take half a second. No pyplot: it would open a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks = trace.pipe.ranks
    figure = Figure(figsize=(10, 1.4 + 0.42 * ranks), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0.07, 0.34 if ranks < 4 else 0.2, 0.84, 0.48 if ranks < 4 else 0.66))
    numbered = len(trace.spans) / ranks <= 120
    for span in trace.spans:
        action = span.action
        chunk = 0 if action.stage < ranks else 1
        width = span.end - span.start
        axis.barh(
            span.rank,
            width,
            left=span.start,
            height=0.86,
            color=_COLOURS[action.work][chunk],
            edgecolor="white",
            linewidth=0.4,
        )
        if numbered:
            middle = span.start + width / 2
            axis.text(middle, span.rank, str(action.microbatch), ha="center", va="center", fontsize=5, color=_INK)
    _label(axis, trace)
    used = [work for work in Work if any(span.action.work is work for span in trace.spans)]
    for work in used:
        axis.barh(0, 0, color=_COLOURS[work][0], label=_NAMES[work])
    figure.legend(loc="lower center", ncols=4, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _label(axis: Any, trace: Trace) -> None:
    """Write what the picture shows above it, and what each rank holds beside it."""
    pipe = trace.pipe
    chunks = f" x {pipe.chunks} chunks" if pipe.chunks > 1 else ""
    axis.set_title(
        f"{pipe.schedule}: {pipe.ranks} ranks{chunks}, {pipe.microbatches} microbatches, idle {trace.idle_share:.1%}",
        fontsize=10,
        color=_INK,
        loc="left",
    )
    axis.set_xlim(0, trace.seconds)
    axis.set_ylim(pipe.ranks - 0.5, -0.5)
    axis.set_yticks(range(pipe.ranks), [f"rank {rank}" for rank in range(pipe.ranks)], fontsize=8, color=_MUTED)
    axis.set_xticks([])
    for rank in range(pipe.ranks):
        words = f" {trace.most_in_flight(rank)} in flight"
        axis.text(trace.seconds, rank, words, va="center", fontsize=7, color=_MUTED)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0)
