"""AdamW against torch's, and every schedule at its corners."""

from __future__ import annotations

import math

import pytest
import torch

from dist_llm.config.training import OptimizerConfig, ScheduleConfig
from dist_llm.optim.adamw import AdamW
from dist_llm.optim.host_adamw import HostAdamW
from dist_llm.optim.schedule import learning_rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs_with_clipping_folded_in(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(7, 5, dtype=dtype), torch.randn(5, dtype=dtype)]
    reference = [torch.nn.Parameter(weight.clone()) for weight in weights]
    groups = [{"params": reference[:1], "weight_decay": 0.1}, {"params": reference[1:], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    ours = AdamW(weights, [True, False], [1.0, 1.0], OptimizerConfig(lr=1e-2))
    for _ in range(5):
        grads = [torch.randn_like(weight) for weight in weights]
        for parameter, grad in zip(reference, grads, strict=True):
            parameter.grad = grad / 4.0
        theirs.step()
        ours.step([grad.clone() for grad in grads], 1e-2, torch.tensor(4.0, dtype=torch.float64))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for weight, parameter in zip(weights, reference, strict=True):
        torch.testing.assert_close(weight, parameter.detach(), rtol=tolerance, atol=tolerance)


def test_a_rate_scales_the_step_and_leaves_the_decay() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(7, 5, dtype=torch.float64) for _ in range(2)]
    reference = [torch.nn.Parameter(weight.clone()) for weight in weights]
    groups = [
        {"params": [parameter], "lr": 1e-2 * rate, "weight_decay": 0.1 / rate}
        for parameter, rate in zip(reference, (0.25, 1.0), strict=True)
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    ours = AdamW(weights, [True, True], [0.25, 1.0], OptimizerConfig(lr=1e-2))
    still = weights[0].clone()
    ours.step([torch.zeros_like(still), None], 1e-2, torch.tensor(1.0))
    torch.testing.assert_close(weights[0], still * (1 - 1e-2 * 0.1))
    for weight, parameter in zip(weights, reference, strict=True):
        parameter.data.copy_(weight)
    ours = AdamW(weights, [True, True], [0.25, 1.0], OptimizerConfig(lr=1e-2))
    for _ in range(3):
        grads = [torch.randn_like(weight) for weight in weights]
        for parameter, grad in zip(reference, grads, strict=True):
            parameter.grad = grad.clone()
        theirs.step()
        ours.step(grads, 1e-2, torch.tensor(1.0))
    for weight, parameter in zip(weights, reference, strict=True):
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_on_the_host_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(7, 5, dtype=dtype), torch.randn(5, dtype=dtype), torch.empty(0, 3, dtype=dtype)]
    copies = [weight.clone() for weight in weights]
    here = AdamW(weights, [True, False, True], [1.0, 0.5, 1.0], OptimizerConfig(lr=1e-2))
    there = HostAdamW(copies, [True, False, True], [1.0, 0.5, 1.0], OptimizerConfig(lr=1e-2))
    for step in range(3):
        grads: list[torch.Tensor | None] = [torch.randn_like(weight) for weight in weights]
        grads[1] = None if step == 1 else grads[1]
        kept = [None if grad is None else grad.clone() for grad in grads]
        for optimizer in (here, there):
            optimizer.step([None if grad is None else grad.clone() for grad in kept], 1e-2, torch.tensor(4.0).double())
    for ours, theirs, slot in zip(copies, weights, there.slots, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(slot.weight, ours)
        assert ours.numel() == 0 or slot.weight.data_ptr() != ours.data_ptr()
    assert here.num_updates == there.num_updates == 3


@pytest.mark.parametrize("kind", [AdamW, HostAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_is_skipped_changes_nothing(kind: type[AdamW], dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5, dtype=dtype)
    start = weight.clone()
    optimizer = kind([weight], [True], [1.0], OptimizerConfig(lr=1e-2))
    nothing = torch.tensor(float("nan"), dtype=torch.float64)
    optimizer.step([torch.full_like(weight, float("inf"))], 1e-2, nothing, torch.ones(()))
    slot = optimizer.slots[0]
    assert torch.equal(weight, start)
    assert not slot.exp_avg.any()
    assert not slot.exp_avg_sq.any()
    optimizer.step([torch.ones_like(weight)], 1e-2, torch.ones((), dtype=torch.float64), torch.zeros(()))
    assert not torch.equal(weight, start)


def test_a_slot_without_gradient_stays() -> None:
    weight = torch.ones(3, 3)
    AdamW([weight], [True], [1.0], OptimizerConfig()).step([None], 1.0, torch.tensor(1.0))
    assert torch.equal(weight, torch.ones(3, 3))


def _rates(name: str, steps: int = 100, **options: object) -> list[float]:
    schedule = ScheduleConfig.model_validate({"name": name, "warmup_steps": 10, "min_ratio": 0.1, **options})
    return [learning_rate(step, 2.0, schedule, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "inverse_sqrt", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(name: str) -> None:
    rates = _rates(name)
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == pytest.approx(2.0)
    assert all(rate >= 0.2 - 1e-12 for rate in rates)


def test_shapes_of_the_decays() -> None:
    assert set(_rates("constant")[10:]) == {2.0}
    cosine, linear = _rates("cosine"), _rates("linear")
    assert cosine[55] == pytest.approx(linear[55]) == pytest.approx(1.1)
    assert cosine[100] == pytest.approx(0.2)
    assert linear[100] == pytest.approx(0.2)
    assert _rates("inverse_sqrt")[39] == pytest.approx(2.0 * math.sqrt(10 / 40))
    stable = _rates("wsd", decay_steps=20)
    assert set(stable[10:81]) == {2.0}
    assert stable[90] == pytest.approx(1.1)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, 3.0, ScheduleConfig(name="cosine"), 10) == 3.0
