"""Scaling laws as pictures: IsoFLOP curves with their optimum, and a fit with its runs and what it predicted."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from dist_llm.planner.isoflop import Profile
from dist_llm.planner.laws import ParametricLaw
from dist_llm.planner.trust import Fit, Prediction

_INK, _MUTED, _GRID, _MARK = "#1f2933", "#6b7785", "#e4e8ec", "#c2571a"
_POINTS = 120
_REACH = 12.0
"""Curves go from the best size over this to the best size times it."""


def draw_isoflop(law: ParametricLaw, budgets: Sequence[float], profiles: Sequence[Profile] = ()) -> bytes:
    """Return a PNG of loss over parameters at each budget, its optimum marked, with measured profiles where given."""
    figure, (axis,) = _figure(1)
    colours = _shades(len(budgets))
    for flops, colour in zip(budgets, colours, strict=True):
        best = law.optimal(flops)
        sizes = [best.num_params * _REACH ** (2 * index / _POINTS - 1) for index in range(_POINTS + 1)]
        axis.plot(sizes, [law.loss(size, flops / (6 * size)) for size in sizes], color=colour, lw=1.8)
        axis.plot([best.num_params], [best.loss], "o", color=_MARK, ms=6, zorder=3)
        words = f"{flops:.1e} FLOPs: {_short(best.num_params)} on {_short(best.tokens)} tokens"
        axis.annotate(words, (best.num_params, best.loss), xytext=(0, -13), textcoords="offset points", fontsize=7.5)
    for profile in profiles:
        sizes = [run.num_params for run in profile.runs]
        axis.plot(sizes, [run.loss for run in profile.runs], "x", color=_INK, ms=5)
    axis.set_xscale("log")
    _label(axis, "parameters", "loss, nats a token", f"IsoFLOP curves of {law.name}; dots are optima")
    return _png(figure)


def draw_fit(fit: Fit, held_out: Sequence[Prediction] = ()) -> bytes:
    """Return a PNG: the fitted curves and runs over tokens, and the errors of the law for runs seen and not seen."""
    figure, (curves, errors) = _figure(2)
    shown = [*fit.runs, *(prediction.run for prediction in held_out)]
    few = _few_sizes([run.num_params for run in shown])
    least, most = min(run.tokens for run in shown), max(run.tokens for run in shown)
    for size, colour in zip(few, _shades(len(few)), strict=True):
        tokens = [least * (most / least) ** (index / _POINTS) for index in range(_POINTS + 1)]
        label = f"{_short(size)} parameters"
        curves.plot(tokens, [fit.law.loss(size, count) for count in tokens], color=colour, lw=1.5, label=label)
    curves.plot([run.tokens for run in fit.runs], [run.loss for run in fit.runs], "o", color=_INK, ms=3.5)
    for prediction in held_out:
        _bar(curves, prediction.run.tokens, prediction, 1.0)
    curves.set_xscale("log")
    curves.legend(frameon=False, fontsize=7.5)
    _label(curves, "tokens", "loss, nats a token", f"{fit.law.name}: {len(fit.runs)} runs (dots)")
    budgets = [run.flops for run in fit.runs]
    errors.plot(budgets, [100 * (fit.law.loss(run.num_params, run.tokens) / run.loss - 1) for run in fit.runs], "o",
                color=_INK, ms=3.5, label="fitted")  # fmt: skip
    for prediction in held_out:
        _bar(errors, prediction.run.flops, prediction, None)
    errors.axhline(0, color=_MUTED, lw=0.8)
    errors.set_xscale("log")
    _label(errors, "training FLOPs, 6 N D", "predicted over measured loss - 1, %", "errors; crosses were not fitted")
    return _png(figure)


def _few_sizes(sizes: Sequence[float]) -> list[float]:
    """Return the sizes that curves are drawn for: all, or six evenly between the least and the largest."""
    distinct = sorted(set(sizes))
    if len(distinct) <= 8:
        return distinct
    return [distinct[0] * (distinct[-1] / distinct[0]) ** (index / 5) for index in range(6)]


def _bar(axis: Any, place: float, prediction: Prediction, scale: float | None) -> None:
    """Draw a prediction with its interval: in nats under a scale, else in percent of what was measured."""
    low, high = prediction.interval
    values = (low, prediction.loss, high)
    if scale is None:
        values = tuple(100 * (value / prediction.run.loss - 1) for value in values)  # type: ignore[assignment]
    axis.plot([place, place], [values[0], values[2]], color=_MARK, lw=1.2)
    axis.plot([place], [values[1]], "x", color=_MARK, ms=7)
    if scale is not None:
        axis.plot([place], [prediction.run.loss], "o", color=_MARK, ms=4)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    # Imported here: they take half a second. No pyplot: it would open a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _label(axis: Any, across: str, up: str, title: str) -> None:
    axis.set_xlabel(across, color=_MUTED, fontsize=9)
    axis.set_ylabel(up, color=_MUTED, fontsize=9)
    axis.set_title(title, color=_INK, fontsize=10, loc="left")
    axis.grid(True, color=_GRID)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_MUTED, labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _shades(count: int) -> list[tuple[float, float, float]]:
    """Return blues from pale to dark."""
    pale, dark = (0.62, 0.76, 0.92), (0.07, 0.22, 0.45)
    places = [index / max(1, count - 1) for index in range(count)]
    return [(*(p + (d - p) * x for p, d in zip(pale, dark, strict=True)),) for x in places]  # type: ignore[misc]


def _short(number: float) -> str:
    """Return a count as 7.1B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
