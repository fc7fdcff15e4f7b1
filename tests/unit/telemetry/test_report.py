"""The picture and the page of a run: drawn from its files, whole by themselves, safe against markup."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from dist_llm.telemetry.picture import draw_loss_curve, smooth
from dist_llm.telemetry.records import RunFiles, write_sample
from dist_llm.telemetry.report import write_report
from tests.unit.telemetry.synthetic import step_record

MARKUP = "<script>alert('x')</script>"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of sixty steps, one of them not finite, that saved, resumed and stopped."""
    folder = tmp_path / "small-run"
    with RunFiles(folder) as files:
        files.write_config(f"run:\n  name: '{MARKUP}'\n")
        files.event("start", 0, "fresh run")
        for step in range(1, 61):
            files.record(step_record(step, loss=math.nan if step == 30 else None))
        files.event("skip", 30, MARKUP)
        files.event("resume", 40, "step-00000040")
        files.validation(60, 4.0, tokens=100)
        write_sample(folder, f"def main():\n    {MARKUP}\n")
        files.event("stop", 60, "all steps done", code=0)
    return folder


def _pixels(path: Path) -> tuple[int, int, int]:
    """Return the height, width and number of different colours of a picture."""
    from matplotlib.image import imread

    pixels = imread(path)
    return (*pixels.shape[:2], len({tuple(pixel) for pixel in pixels[::4, ::4].reshape(-1, pixels.shape[2])}))


def test_the_picture_is_drawn(run_dir: Path) -> None:
    path = draw_loss_curve(run_dir)
    assert path == run_dir / "loss.png"
    height, width, colours = _pixels(path)
    assert (height, width) == (1000, 1500)
    assert colours > 20
    first = path.read_bytes()
    assert draw_loss_curve(run_dir).read_bytes() == first


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_picture_of_almost_nothing(tmp_path: Path, steps: int) -> None:
    with RunFiles(tmp_path) as files:
        for step in range(1, steps + 1):
            files.record(step_record(step))
    assert _pixels(draw_loss_curve(tmp_path))[:2] == (1000, 1500)


def test_a_picture_of_a_run_that_never_was_finite(tmp_path: Path) -> None:
    with RunFiles(tmp_path) as files:
        files.record(step_record(1, loss=math.nan))
    draw_loss_curve(tmp_path)
    assert "first loss" not in write_report(tmp_path).read_text()


def test_the_page_needs_no_other_file_and_runs_no_script(run_dir: Path) -> None:
    draw_loss_curve(run_dir)
    page = write_report(run_dir).read_text()
    assert "data:image/png;base64," in page
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []
    assert "http" not in page
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3


def test_the_page_tells_the_run(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    assert "<h1>small-run</h1>" in page
    assert "Stopped at step 60: all steps done" in page
    assert "<dt>tokens</dt><dd>492k </dd>" in page
    assert "16.4k <small>tokens/s</small>" in page
    assert "40.0% <small>of dense peak</small>" in page
    assert page.count("<tr><td>") == 4
    assert "data:image" not in page


def test_the_page_of_a_run_that_did_not_begin(tmp_path: Path) -> None:
    assert "Not started" in write_report(tmp_path).read_text()


def test_smoothing_does_not_lag_and_keeps_gaps() -> None:
    falling = [float(100 - step) for step in range(50)]
    assert smooth(falling, 3)[3:-3] == pytest.approx(falling[3:-3])
    gapped = smooth([1.0, None, 3.0], 1)
    assert gapped[0] == 1.0
    assert math.isnan(gapped[1])
    assert gapped[2] == 3.0
