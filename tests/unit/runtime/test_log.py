"""Rank 0 tells what happens; the others only what is wrong, under their number."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from dist_llm.runtime.log import configure_logging, get_logger


@pytest.fixture(autouse=True)
def _logger_kept() -> Iterator[None]:
    logger = logging.getLogger("dist_llm")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def _say_both() -> None:
    get_logger("dist_llm.train.loop").info("step done")
    get_logger("elsewhere").warning("disk is slow")


def test_rank_zero_says_both(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0)
    _say_both()
    assert capsys.readouterr() == ("", "step done\ndisk is slow\n")


def test_other_ranks_warn_under_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(3)
    _say_both()
    assert capsys.readouterr() == ("", "[rank 3] disk is slow\n")


def test_configuring_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0)
    configure_logging(0, to_stderr=False)
    _say_both()
    assert capsys.readouterr() == ("step done\ndisk is slow\n", "")


def test_debug_says_where_and_when(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(1, debug=True)
    get_logger("dist_llm.data").debug("cache hit")
    assert "[rank 1]" in (error := capsys.readouterr().err)
    assert "dist_llm.data: cache hit" in error
