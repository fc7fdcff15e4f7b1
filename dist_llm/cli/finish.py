"""What a person sees when a run ends: a loss picture, a generated sample and the report page in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_llm.config.operations import TelemetryConfig


def write_keepsakes(run_dir: Path, telemetry: TelemetryConfig) -> None:
    """Draw loss.png, generate sample.txt and write report.html, as far as telemetry asks for them, and say where."""
    from dist_llm.evaluate.generate import generate_text
    from dist_llm.runtime.log import get_logger
    from dist_llm.telemetry.picture import draw_loss_curve
    from dist_llm.telemetry.records import write_sample
    from dist_llm.telemetry.report import write_report

    log = get_logger(__name__)
    if telemetry.picture:
        log.info("loss curve: %s", draw_loss_curve(run_dir))
    if telemetry.sample_tokens:
        text = generate_text(run_dir, telemetry.sample_prompt, telemetry.sample_tokens)
        write_sample(run_dir, text)
        log.info("a sample from the model (%s):\n%s", run_dir / "sample.txt", text)
    log.info("report: %s", write_report(run_dir))


def try_keepsakes(run_dir: Path, telemetry: TelemetryConfig) -> None:
    """Write the keepsakes of a finished run; the run is safe on disk, so a failure here is a warning and no more."""
    from dist_llm.runtime.log import get_logger

    try:
        write_keepsakes(run_dir, telemetry)
    except Exception as error:
        get_logger(__name__).warning("the run is done and saved, but its picture or sample failed: %s", error)
