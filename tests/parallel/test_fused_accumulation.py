"""Gradients add up in fp32 over microbatches, fused or not; fused ones are never rounded before they are added."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from dist_llm.config.run import RunConfig
from dist_llm.ops import linear
from dist_llm.parallel import apply
from dist_llm.runtime.pool import WorkerPool
from dist_llm.types import Batch
from tests.parallel.test_accounting import assert_equal, measured_and_formula
from tests.parallel.tiny import GPT2, MOE, Curve, build, curve, random_batch, tiny_config

SMALL: dict[str, object] = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "vocab_size": 32}
COPIES = 320
"""Microbatches: in bf16 a sum of equal numbers stays at 256 of them."""


def norm_of_copies(config: RunConfig, broken: bool = False) -> float:
    """Return the gradient norm of a batch whose sequences are all the same. broken: sums are in bf16."""
    formats = apply.MixedPrecisionPolicy

    def narrow(**settings: object) -> object:
        return formats(**{**settings, "reduce_dtype": torch.bfloat16})  # type: ignore[arg-type]

    with patch.object(apply, "MixedPrecisionPolicy", narrow if broken else formats):
        engine = build(config)
    mine = random_batch(config, engine.data_slice, 0)
    tokens = torch.arange(config.data.seq_len + 1) % config.model.vocab_size
    rows = mine.tokens.shape[0]
    batch = Batch(0, tokens[:-1].expand(rows, -1).clone(), tokens[1:].expand(rows, -1).clone(), mine.samples)
    return engine.train_step(batch).grad_norm


SUMS: list[tuple[int, dict[str, object]]] = [
    (1, {"zero": 1}),
    (1, {"zero": 0, "fused_accumulation": True}),
    (1, {"zero": 2}),
    (1, {"zero": 3}),
    (2, {"zero": 1, "pipeline": 2, "schedule": "zero_bubble", "fused_accumulation": True}),
]


def _copies(parallel: dict[str, object], count: int) -> RunConfig:
    return tiny_config(parallel, SMALL, {"global_batch": count, "seq_len": 8}, precision={"name": "bf16"})


@pytest.mark.slow
def test_small_gradients_do_not_vanish_in_a_large_sum(pool: WorkerPool) -> None:
    few = pool.run(norm_of_copies, _copies({}, 4), world=1)[0]
    for ranks, parallel in SUMS:
        many = pool.run(norm_of_copies, _copies(parallel, COPIES), world=ranks)[0]
        assert many == pytest.approx(few, rel=2e-2), parallel
    broken = pool.run(norm_of_copies, _copies({}, COPIES), True, world=1)[0]
    assert broken < 0.9 * few


LAYOUTS: list[tuple[int, dict[str, object], dict[str, object]]] = [
    (2, {"zero": 1}, {}),
    (2, {"zero": 0, "tensor": 2, "sequence": True}, GPT2),
    (4, {"zero": 1, "pipeline": 2, "recompute": "full"}, {}),
    (4, {"zero": 1, "pipeline": 2, "schedule": "zbv"}, GPT2),
    (4, {"zero": 1, "expert": 2, "replicate": 2}, MOE),
]


@pytest.mark.parametrize(("ranks", "parallel", "model"), LAYOUTS, ids=str)
def test_fused_is_no_worse_and_counted(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object]
) -> None:
    def config(precision: str, fused: bool) -> RunConfig:
        return tiny_config({**parallel, "fused_accumulation": fused}, model, precision={"name": precision})

    exact = pool.run(curve, config("fp32", False), 1, world=ranks)[0][0]
    plain = pool.run(curve, config("bf16", False), 1, world=ranks)[0][0]
    fused = pool.run(curve, config("bf16", True), 1, world=ranks)[0][0]
    assert fused != plain
    assert abs(fused[1] - exact[1]) <= abs(plain[1] - exact[1]) + 2e-3 * exact[1]
    assert_equal(pool.run(measured_and_formula, config("bf16", True), world=ranks), dropless=model is MOE)


def twice(config: RunConfig) -> Curve:
    """Train with every fused product added twice."""
    add = linear.add_weight_gradient

    def add_twice(total: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
        add(total, grad, x)
        add(total, grad, x)

    with patch.object(linear, "add_weight_gradient", add_twice):
        return curve(config, 1)


def test_a_product_added_twice_is_found(pool: WorkerPool) -> None:
    config = tiny_config({"fused_accumulation": True}, precision={"name": "bf16"})
    sound, broken = (pool.run(job, config, *more, world=1)[0][0] for job, more in ((curve, (1,)), (twice, ())))
    assert broken[1] > 1.2 * sound[1]
