"""A step asks the device for no value before its end: on tensors that have none, it would have to stop there."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dist_llm.config.run import RunConfig
from dist_llm.engine.model import splittable
from dist_llm.engine.native import NativeEngine
from dist_llm.engine.totals import Figures, Totals, totals_of
from dist_llm.parallel import grad_norm
from dist_llm.runtime.fake_group import fake_group
from dist_llm.runtime.mesh import build_mesh
from dist_llm.train.dry_run import without_values
from dist_llm.types import StepResult
from tests.parallel.tiny import GPT2, random_batch, tiny_config

LAYOUTS = {
    "alone": (1, tiny_config()),
    "gpt2": (1, tiny_config(None, GPT2, {"document_mask": True})),
    "fp16": (1, tiny_config(precision={"name": "fp16"})),
    "recompute": (1, tiny_config({"recompute": "full"})),
    "dp2 zero1": (2, tiny_config({"data": 2, "zero": 1})),
    "tp2 sequence": (2, tiny_config({"tensor": 2, "sequence": True})),
    "tp2 dp2 zero3 bf16": (4, tiny_config({"tensor": 2, "data": 2, "zero": 3}, precision={"name": "bf16"})),
    "cp2": (2, tiny_config({"context": 2})),
}


def _step(config: RunConfig, ranks: int) -> tuple[StepResult, list[str]]:
    """Train a step of tensors without values on the first rank; return its result and what it did, in order."""
    did: list[str] = []

    def read(totals: Totals) -> Figures:
        did.append("read")
        with pytest.raises(DataDependentOutputException):
            totals.values.tolist()
        return Figures(1.0, 128, 1.0, (), False)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_group(ranks, 0), mock.patch.object(Totals, "read", read):
        mesh = build_mesh(config.parallel, torch.device("cpu"))
        engine = NativeEngine(config, mesh, without_values(splittable(config.model, config.run.seed), mode))
        engine.observe = did.append
        batch = random_batch(config, engine.data_slice, 0)
        with mode:
            result = engine.train_step(batch)
        engine.close()
    return result, did


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_reads_nothing_before_its_end(name: str) -> None:
    ranks, config = LAYOUTS[name]
    result, did = _step(config, ranks)
    assert result.loss == 1.0
    assert did == ["last_forward", "before_update", "after_update", "read"]


def test_a_step_that_waits_is_caught() -> None:
    true_sum = grad_norm.primary_square_sum

    def waits(*args: object) -> Tensor:
        total = true_sum(*args)  # type: ignore[arg-type]
        assert total.item() >= 0
        return total

    with mock.patch("dist_llm.engine.native.primary_square_sum", waits), pytest.raises(DataDependentOutputException):
        _step(tiny_config(), 1)


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("unit", [1.0, 65536 / 128])
def test_what_follows_from_the_sums_is_what_the_host_would_compute(clip: float, unit: float) -> None:
    loss, counted, squares = 713.25 * unit, 127.0, 3.7e5 * unit**2
    totals = totals_of(torch.tensor([loss, counted, squares, 5.0, 7.0], dtype=torch.float64), unit, clip)
    norm = squares**0.5 / (counted * unit)
    assert totals.read() == Figures(loss / (counted * unit), 127, norm, (5.0, 7.0), False)
    assert float(totals.divisor) == counted * unit / (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)


@pytest.mark.parametrize("broken", [[float("nan"), 4.0, 1.0], [1.0, 4.0, float("inf")], [1.0, 4.0, float("nan")]])
def test_what_is_not_finite_is_skipped(broken: list[float]) -> None:
    totals = totals_of(torch.tensor(broken, dtype=torch.float64), 1.0, 1.0)
    assert totals.read().skipped
    assert float(totals.skip) == 1.0


def test_a_step_without_counted_tokens_is_none_of_zero_over_zero() -> None:
    found = totals_of(torch.zeros(3, dtype=torch.float64), 8.0, 1.0).read()
    assert (found.loss, found.tokens, found.grad_norm, found.skipped) == (0.0, 0, 0.0, False)
