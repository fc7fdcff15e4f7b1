"""The golden curves are met by one process and by a mixed layout of four ranks, in fp32 and in fp64."""

from __future__ import annotations

import pytest

from dist_llm.runtime.pool import WorkerPool
from tests.golden.curves import LAYOUTS, MODELS, STEPS, golden_config, read_curves, train_curve, write_tokens
from tests.parallel.tiny import largest_gap
from tests.tolerances import FP32, FP64

TOLERANCES = {"fp32": FP32, "fp64": FP64}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("golden"))


def test_the_golden_models_learn() -> None:
    curves = read_curves()
    assert set(curves) == set(MODELS)
    for curve in curves.values():
        assert len(curve) == STEPS
        assert curve[-1][0] < curve[0][0] - 0.1


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("model", MODELS)
def test_golden_curve_is_met(pool: WorkerPool, prefix: str, model: str, ranks: int, precision: str) -> None:
    config = golden_config(model, precision, LAYOUTS[model] if ranks > 1 else None)
    golden = read_curves()[model]
    for rank, curve in enumerate(pool.run(train_curve, config, prefix, world=ranks)):
        gap = largest_gap(curve, golden)
        assert gap <= TOLERANCES[precision], f"rank {rank} of {ranks}: {gap:.2e}"


@pytest.mark.parametrize("model", MODELS)
def test_a_small_change_is_found(pool: WorkerPool, prefix: str, model: str) -> None:
    """A learning rate off by a thousandth is far outside the tolerance."""
    config = golden_config(model, "fp32", lr=1.001e-3)
    assert largest_gap(pool.run(train_curve, config, prefix, world=1)[0], read_curves()[model]) > FP32
