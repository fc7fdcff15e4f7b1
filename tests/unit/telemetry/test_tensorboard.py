"""Scalars reach TensorBoard's files under the run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_llm.telemetry.tensorboard import TensorBoard
from tests.unit.telemetry.synthetic import step_record


def test_scalars_are_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, first_step=1)
    for step in (1, 2, 3):
        board(step_record(step, mfu=None))
    board.validation(3, 4.5)
    board.text(3, "sample", "def main():\n    pass")
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert losses[1].value == pytest.approx(step_record(2).loss)
    assert events.Scalars("validation/loss")[0].value == pytest.approx(4.5)
    assert "speed/mfu" not in events.Tags()["scalars"]
    assert "speed/tokens_per_second" in events.Tags()["scalars"]


def test_a_resume_hides_what_is_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 5), (4, 6)):
        board = TensorBoard(tmp_path, first_step=first)
        for step in range(first, last + 1):
            board(step_record(step, loss=float(10 * first + step)))
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("train/loss")[3].value == 44
