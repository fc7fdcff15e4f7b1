"""`report.html`: a run on one page that needs no other file: its figures, curve, sample text, events and config.

Everything that it shows comes from the run's files and is escaped, for a corpus or a model may write markup.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median

from dist_llm.telemetry.live import format_duration, format_rate
from dist_llm.telemetry.picture import PICTURE_FILE
from dist_llm.telemetry.records import (
    CONFIG_FILE,
    EVENTS_FILE,
    PREDICTION_FILE,
    REPORT_FILE,
    SAMPLE_FILE,
    MetricsLine,
    read_lines,
    read_metrics,
    write_whole,
)

_SHOWN_EVENTS = 200


@dataclass(frozen=True)
class Figure:
    """One number of the page's head."""

    label: str
    value: str
    unit: str = ""


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` from the run's files, as far as they exist, and return its path.

    Raises StorageError where the system refuses to read or write.
    """
    # Imported here: a run writes its report once.
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = files("dist_llm.telemetry").joinpath("report.html.j2").read_text(encoding="utf-8")
    events = read_lines(run_dir / EVENTS_FILE)
    picture = run_dir / PICTURE_FILE
    page = environment.from_string(source).render(
        name=run_dir.name,
        state=_state(events),
        figures=run_figures(run_dir),
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else "",
        sample=_text(run_dir / SAMPLE_FILE),
        events=[_row(event) for event in events[-_SHOWN_EVENTS:]],
        hidden=max(0, len(events) - _SHOWN_EVENTS),
        config=_text(run_dir / CONFIG_FILE),
    )
    path = run_dir / REPORT_FILE
    write_whole(path, page)
    return path


@dataclass(frozen=True)
class Foretold:
    """What was foretold of a run and what was measured, in the same unit."""

    foretold: float
    measured: float

    @property
    def error(self) -> float:
        """Foretold over measured, less one."""
        return self.foretold / self.measured - 1


def run_figures(run_dir: Path) -> list[Figure]:
    """Return the numbers of a run, and those that were foretold of it."""
    labels = {
        "step_seconds": ("foretold step", "s"),
        "memory_gib": ("foretold memory", "GiB"),
        "loss": ("foretold loss", "nats"),
    }
    found = _figures(read_metrics(run_dir))
    for name, each in compare_foretold(run_dir).items():
        label, unit = labels[name]
        found.append(Figure(label, f"{each.foretold:.3g} {unit}", f"{each.error:+.0%} of {each.measured:.3g}"))
    return found


def compare_foretold(run_dir: Path) -> dict[str, Foretold]:
    """Return `step_seconds`, `memory_gib` and `loss` of a run, as far as they were foretold and measured."""
    steps, prediction = read_metrics(run_dir), _prediction(run_dir / PREDICTION_FILE)
    seconds = [line.step_seconds for line in steps if line.step_seconds]
    losses = [line.loss for line in steps if line.loss][-20:]
    measured = {
        "step_seconds": median(seconds[len(seconds) // 4 :]) if seconds else None,
        "memory_gib": max((line.memory_gib for line in steps if line.memory_gib), default=None),
        "loss": sum(losses) / len(losses) if losses else None,
    }
    return {
        name: Foretold(prediction[name], real)
        for name, real in measured.items()
        if real is not None and name in prediction
    }


def _figures(steps: list[MetricsLine]) -> list[Figure]:
    """Return the head's numbers: loss first and last, work done, speed (medians, so that a pause does not count)."""
    losses = [line.loss for line in steps if line.loss is not None]
    if not losses:
        return []
    last = losses[-20:]
    rates = [line.tokens_per_second for line in steps if line.tokens_per_second is not None]
    utilisation = [line.mfu for line in steps if line.mfu is not None]
    memory = [line.memory_gib for line in steps if line.memory_gib is not None]
    seconds = sum(line.step_seconds for line in steps if line.step_seconds is not None)
    figures = [
        Figure("steps", f"{steps[-1].step}"),
        Figure("first loss", f"{losses[0]:.3f}", "nats a token"),
        Figure("last loss", f"{sum(last) / len(last):.3f}", f"mean of {len(last)} steps"),
        Figure("tokens", format_rate(steps[-1].tokens)),
        Figure("time in steps", format_duration(seconds)),
    ]
    if rates:
        figures.append(Figure("speed", format_rate(median(rates)), "tokens/s"))
    if utilisation:
        figures.append(Figure("MFU", f"{100 * median(utilisation):.1f}%", "of dense peak"))
    if memory:
        figures.append(Figure("peak memory", f"{max(memory):.2f}", "GiB on rank 0"))
    return figures


def _prediction(path: Path) -> dict[str, float]:
    """Return the numbers of prediction.json; none where it is absent or is not what it should be."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    numbers = found.items() if isinstance(found, dict) else ()
    return {name: float(value) for name, value in numbers if isinstance(value, int | float) and value > 0}


def _state(events: list[dict[str, object]]) -> str:
    """Say in one line how the run stands, from its last event that tells."""
    for event in reversed(events):
        if event.get("kind") == "stop":
            code = f" (exit code {event['code']})" if event.get("code") else ""
            return f"Stopped at step {event.get('step')}: {event.get('reason')}{code}"
        if event.get("kind") in ("start", "resume"):
            return f"Running since step {event.get('step')}"
    return "Not started"


def _row(event: dict[str, object]) -> dict[str, str]:
    """Return what the table shows of an event: its time to the second."""
    shown = {name: str(event.get(name, "")) for name in ("time", "step", "kind", "reason")}
    return {**shown, "time": shown["time"][:19].replace("T", " ")}


def _text(path: Path) -> str:
    """Return a text file of the run, or nothing where it is absent."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
