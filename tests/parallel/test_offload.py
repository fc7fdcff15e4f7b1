"""What is kept in host memory changes nothing but the place: numbers bit for bit, bytes as the formulas say."""

from __future__ import annotations

import pytest
import torch

from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from dist_llm.types import TensorShard
from tests.parallel.test_accounting import assert_equal, measured_and_formula
from tests.parallel.tiny import GPT2, MOE, build, curve, random_batch, tiny_config

LAYOUTS: list[tuple[int, dict[str, object], dict[str, object], str]] = [
    (1, {"zero": 1}, {}, "fp32"),
    (2, {"zero": 0}, GPT2, "fp32"),
    (2, {"zero": 1}, {}, "fp16"),
    (3, {"zero": 2}, {"vocab_size": 50}, "fp64"),
    (4, {"zero": 3, "replicate": 2}, GPT2, "bf16"),
    (4, {"zero": 2, "replicate": 2}, {}, "fp32"),
    (2, {"zero": 1, "tensor": 2, "sequence": True}, {}, "fp32"),
    (2, {"zero": 2, "pipeline": 2}, {}, "fp32"),
    (4, {"zero": 3, "pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}, {}, "fp32"),
    (4, {"zero": 1, "pipeline": 2, "virtual_pipeline": 2, "schedule": "zero_bubble"}, GPT2, "fp32"),
    (4, {"zero": 2, "pipeline": 2, "schedule": "zbv"}, {}, "bf16"),
    (4, {"zero": 3, "expert": 2, "pipeline": 2, "schedule": "dualpipev"}, MOE, "fp32"),
]


def _config(layout: tuple[int, dict[str, object], dict[str, object], str], offload: str) -> RunConfig:
    ranks, parallel, model, precision = layout
    batch: dict[str, object] = {"global_batch": 12} if ranks == 3 else {}
    return tiny_config({**parallel, "offload": offload}, model, batch, precision={"name": precision})


def _offloads(parallel: dict[str, object]) -> list[str]:
    return ["optimizer", "parameters"] if parallel["zero"] else ["optimizer"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_offload_is_bit_equal_and_counted(
    pool: WorkerPool, layout: tuple[int, dict[str, object], dict[str, object], str]
) -> None:
    ranks, parallel, model, _ = layout
    plain = pool.run(curve, _config(layout, "none"), 3, world=ranks)
    for offload in _offloads(parallel):
        config = _config(layout, offload)
        assert pool.run(curve, config, 3, world=ranks) == plain, offload
        assert_equal(pool.run(measured_and_formula, config, world=ranks), dropless=model is MOE)


def _copied(state: tuple[TensorShard, ...]) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    return {(shard.name, shard.offsets): shard.data.clone() for shard in state}


def resumed_curve(config: RunConfig, other: RunConfig, forget: bool = False) -> tuple[object, object]:
    """Train 4 steps; and 2, hand the state to an engine of `other`, train 2 more: the last two steps of each.

    forget: its optimizer takes no notice of the weights that it is handed.
    """
    whole = curve(config, 4)[2:]
    first, second = build(config), build(other)
    for step in range(2):
        first.train_step(random_batch(config, first.data_slice, step))
    state = first.state()
    saved = _copied(state.tensors)
    for shard in second.state().tensors:
        shard.data.copy_(saved[shard.name, shard.offsets])
    if forget:
        second.optimizer.take_weights = lambda: None  # type: ignore[method-assign]
    second.restore(dict(state.facts))
    results = [second.train_step(random_batch(config, second.data_slice, step)) for step in (2, 3)]
    return whole, [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize(("before", "after"), [("none", "optimizer"), ("optimizer", "parameters")])
def test_a_state_moves_between_places(pool: WorkerPool, before: str, after: str) -> None:
    layout = LAYOUTS[5]
    for whole, resumed in pool.run(resumed_curve, _config(layout, before), _config(layout, after), world=layout[0]):
        assert resumed == whole


def test_masters_that_miss_a_restore_are_found(pool: WorkerPool) -> None:
    config = _config(LAYOUTS[1], "optimizer")
    whole, resumed = pool.run(resumed_curve, config, config, True, world=2)[0]
    assert resumed != whole
