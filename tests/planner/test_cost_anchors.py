"""Third-party tables of measured steps, products and all-reduces, foretold without a fit to any of them here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.foresight_step_time import TABLES, errors_of, foretell, plain, regrets, table
from dist_llm.cli.compose import compose
from dist_llm.config.cluster import ClusterConfig
from dist_llm.config.decode import decode
from dist_llm.planner.cost.collectives import all_reduce_seconds, group_of
from dist_llm.planner.cost.hardware import device_of, fabric_of
from dist_llm.planner.cost.matmul import matmul_seconds

BEST_RULE = 5.7
"""Mean regret of the best rule of two lines on the same runs, in percent (baseline_layout_choice_regret)."""


def cluster(name: str) -> ClusterConfig:
    """Return a preset."""
    return decode(compose([f"cluster={name}"])).cluster


@pytest.mark.parametrize("name", [name for name, (_, bound) in TABLES.items() if bound is not None])
def test_steps(anchors: Path, name: str) -> None:
    read, bound = TABLES[name]
    assert bound is not None
    rows = list(read(anchors))
    stated = errors_of(name, [(foretell(row), row.seconds) for row in rows], bound)
    left_out = errors_of(name, [(foretell(plain(row)), row.seconds) for row in rows], bound)
    assert stated.mape <= bound, str(stated)
    assert left_out.mape <= bound, str(left_out)


def test_layout_choice_beats_rules(anchors: Path) -> None:
    found = regrets(anchors)
    assert sum(found) / len(found) < BEST_RULE


@pytest.mark.parametrize(
    ("system", "preset", "most"), [("a100_pcie", "a100-80gb", 6.0), ("b200_bf16_ceperm", "b200", 17.0)]
)
def test_products(anchors: Path, system: str, preset: str, most: float) -> None:
    device = device_of(cluster(preset), "bf16")
    pairs = []
    for row in table(anchors, "simumax_gemm_efficiency_by_shape"):
        if row["system"] == system and row["op"] == "matmul":
            batch, rows, inner, columns = (int(row[key]) for key in "bmkn")
            rate = float(row["measured_eff"]) * float(row["peak_tflops"]) * 1e12
            pairs.append(
                (matmul_seconds(device, rows, inner, columns, batch), 2 * batch * rows * inner * columns / rate)
            )
    assert errors_of(system, pairs, None).mape <= most


def test_all_reduces(anchors: Path) -> None:
    fabric = fabric_of(cluster("a100-80gb"), 8)
    rows = [row for row in table(anchors, "vtrain_allreduce_lut") if row["gpu"] == "a100"]
    pairs = []
    for row in rows:
        group = group_of(fabric, int(row["n_gpus"]), 1)
        seconds = all_reduce_seconds(fabric, group, float(row["size_MiB"]) * 2**20)
        pairs.append((seconds, float(row["time_ns_in_place"]) * 1e-9))
    assert errors_of("all-reduce", pairs, None).mape <= 10.0
