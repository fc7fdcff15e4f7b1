"""The line a person watches, on a terminal and in a log file."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from dist_llm.telemetry.live import LiveLine, format_duration, format_rate
from tests.unit.telemetry.synthetic import step_record


class Run:
    """A run of steps that take as long as they say, shown on a console of memory."""

    def __init__(self, total: int, interval: int = 1, terminal: bool = False, width: int = 120) -> None:
        self.now = 0.0
        self.output = io.StringIO()
        console = Console(file=self.output, force_terminal=terminal, width=width, soft_wrap=True)
        self.live = LiveLine(total, interval, console, clock=lambda: self.now)

    def step(self, number: int, seconds: float) -> None:
        self.now += seconds
        self.live(replace(step_record(number), step_seconds=seconds))

    def shown(self) -> list[int]:
        return [int(line.split()[1].split("/")[0]) for line in self.output.getvalue().splitlines()]


def test_a_plain_line_says_it_all() -> None:
    run = Run(300)
    run.step(120, 0.5)
    assert run.output.getvalue() == (
        "step 120/300  loss 3.2489  grad 0.508  lr 3.00e-04  16.4k tok/s  MFU 40.0%  ETA 1:30\n"
    )


def test_without_a_peak_the_line_has_no_mfu() -> None:
    run = Run(300)
    run.live(step_record(1, mfu=None))
    assert "MFU" not in run.output.getvalue()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.01, [1, 101, 201, 250]),  # fast: at most a line a second
        (0.2, [1, *range(11, 250, 10), 250]),  # every ten steps
        (2.0, [1, *range(4, 250, 3), 250]),  # every five seconds
        (9.0, list(range(1, 251))),  # slow: every step
    ],
)
def test_plain_lines_are_throttled_but_first_and_last(seconds: float, expected: list[int]) -> None:
    run = Run(250)
    for number in range(1, 251):
        run.step(number, seconds)
    assert run.shown() == expected


def test_the_log_interval_is_kept() -> None:
    run = Run(50, interval=20)
    for number in range(1, 51):
        run.step(number, 9.0)
    assert run.shown() == [1, 20, 40, 50]


def test_a_resumed_run_shows_its_first_step() -> None:
    run = Run(300)
    run.step(201, 0.01)
    assert run.shown() == [201]


def test_the_eta_follows_the_pace() -> None:
    run = Run(1000)
    for number in range(1, 101):
        run.step(number, 30.0 if number == 1 else 1.0)
    assert "ETA 15:0" in run.output.getvalue().splitlines()[-1]


def test_what_is_not_finite_is_shown_and_named() -> None:
    run = Run(10)
    run.live(replace(step_record(1, loss=math.nan), grad_norm=math.inf, skipped=True))
    assert "loss nan  grad inf" in run.output.getvalue()
    assert "step skipped" in run.output.getvalue()


@pytest.mark.parametrize("width", [40, 80, 100, 130])
def test_a_terminal_gets_one_line_that_fits(width: int) -> None:
    run = Run(30, terminal=True, width=width)
    with run.live:
        for number in range(1, 31):
            run.step(number, 0.1)
    console = Console(file=io.StringIO(), width=width)
    last = run.output.getvalue().replace("\r", "\n").splitlines()
    plain = [console.render_str(line) for line in last]
    text = "".join(part.plain for part in plain)
    assert "30/30" in text
    # One line feed: the line is drawn over itself until the run closes it.
    assert run.output.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4, "0"),
        (950, "950"),
        (12345, "12.3k"),
        (999960, "1000k"),
        (4.56e6, "4.56M"),
        (7e12, "7000G"),
        (math.nan, "nan"),
    ],
)
def test_rates(value: float, text: str) -> None:
    assert format_rate(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (754, "12:34"), (12345, "3:25:45"), (183840, "2d 03:04"), (math.inf, "-")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
