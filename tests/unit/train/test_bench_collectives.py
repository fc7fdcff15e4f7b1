"""Collectives are timed by kind and size on real ranks, and the link that a cost model has made is found again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_llm.cli.bench_collectives import describe, read_size
from dist_llm.planner.cost.hardware import Fabric
from dist_llm.train.bench_collectives import (
    LEAVING,
    SIZES,
    bench_collectives,
    fit_link,
    foretold_seconds,
    shared_size,
)
from tests.parallel.tiny import tiny_config

FABRIC = Fabric(8, 1e9, 5e-5, False, 1e9, 1e-5)


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_link_that_made_the_times_is_found(ranks: int) -> None:
    there = replace(FABRIC, link_bytes=7.3e9, link_seconds=2.1e-5)
    seconds = {(kind, size): foretold_seconds(there, ranks, kind, size) for kind in LEAVING for size in SIZES}
    seconds["all_gather", SIZES[3]] *= 5  # a round that something disturbed
    found = fit_link(FABRIC, ranks, seconds)
    assert found.link_bytes == pytest.approx(7.3e9, rel=0.05)
    assert found.link_seconds == pytest.approx(2.1e-5, rel=0.05)


def test_every_kind_is_timed_on_ranks_of_its_own() -> None:
    said: list[str] = []
    facts = bench_collectives(tiny_config(), 3, sizes=(4, 5000), rounds=2, report=said.append)
    rows: list[dict[str, float]] = facts["rows"]  # type: ignore[assignment]
    assert [(row["kind"], row["bytes"]) for row in rows] == [(kind, size) for kind in LEAVING for size in (12, 4992)]
    for row in rows:
        share = LEAVING[str(row["kind"])](3)
        assert row["gb_per_second"] == pytest.approx(share * row["bytes"] / row["seconds"] / 1e9)
        assert 0 < row["of_copy"] < 1
        assert row["foretold_seconds"] == pytest.approx(row["seconds"] * (1 + row["foretold_error"]))
    assert len(said) == 2
    text = describe(facts)
    assert "all_to_all" in text
    assert "nearest to these: cluster.link_gb_per_second=" in text


def test_payloads_are_such_that_ranks_can_share_them() -> None:
    assert [shared_size(size, 3) for size in (4, 12, 23, 24, 1 << 20)] == [12, 12, 12, 24, 1048572]


def test_sizes_are_read_with_their_unit() -> None:
    assert [read_size(text) for text in ("4096", "64KiB", "4 mib", "1GiB", "8B")] == [4096, 65536, 4 << 20, 1 << 30, 8]
    assert [read_size(text) for text in ("3", "0", "-4", "17GiB", "4MB", "1.5MiB", "", "x")] == [None] * 8
