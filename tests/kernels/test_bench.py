"""`dist-llm bench kernels` times every backend that loads, and says how they compare."""

from __future__ import annotations

import pytest
import torch

from dist_llm.cli.bench import _kernel_cells
from dist_llm.ops.backends import NATIVE, REFERENCE, TORCH
from dist_llm.train import bench_kernels
from dist_llm.train.bench_kernels import TIMED, Timed, timed_ops


def test_every_backend_that_loads_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "backend_problem", lambda op, backend, place: backend == NATIVE or None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    seen = []

    def ours(backend: str, x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(backend)
        return (x * 2,)

    timed = Timed("gelu", "gelu", ((3, 4),), lambda x: (x * 2,), ours)
    rows = bench_kernels._time_op(timed, 1, 2, torch.device("cpu"))
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    assert all(row["native"] is None and row[TORCH] > 0 and row[REFERENCE] > 0 for row in rows)
    assert seen == [REFERENCE, TORCH] * 6, "each pass has a round to warm up, and two that count"


def test_ops_are_computed_alike_by_eager_and_ours() -> None:
    for timed in timed_ops(torch.device("cpu")):
        inputs = [torch.randn(shape) for shape in timed.shapes]
        torch.testing.assert_close(timed.ours(REFERENCE, *inputs), timed.eager(*inputs), rtol=1e-4, atol=1e-4)
    assert len(set(TIMED)) == len(TIMED) == 9


def test_the_best_of_ours_is_compared() -> None:
    row = {
        "op": "gelu",
        "shape": [3, 4],
        "threads": 1,
        "pass": "forward",
        "native": None,
        "eager": 4e-3,
        "inductor": 2e-3,
    }
    cells = _kernel_cells([{**row, "torch": 4e-3}, {**row, "reference": 8e-3, "torch": 1e-3}])
    assert [cell["eager, inductor / best"] for cell in cells] == ["1.00, 0.50", "4.00, 2.00"]
    assert [cell["reference ms"] for cell in cells] == ["-", "8.000"]
    assert cells[0].keys() == cells[1].keys()
