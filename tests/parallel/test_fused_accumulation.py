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
from tests.tolerances import NEAR_SUM, SAME_SUM, VISIBLE_SUM

SMALL: dict[str, object] = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "vocab_size": 32,
    # The two gradients of a tied weight meet in bf16 before they reach a sum; in torch 2.15 all but the first time.
    "tie_embeddings": False,
}
COPIES = 96
"""Microbatches with one gradient: their sum has its direction to the last bits of fp32, and is far off in bf16."""


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


def _drift(pool: WorkerPool, ranks: int, parallel: dict[str, object], broken: bool = False) -> float:
    """Return how far the mean gradient of many equal microbatches is from that of four, relative, by its norm."""
    few, many = (pool.run(norm_of_copies, _copies(parallel, count), broken, world=ranks)[0] for count in (4, COPIES))
    return abs(many / few - 1)


@pytest.mark.slow
def test_sums_over_microbatches_are_in_fp32(pool: WorkerPool) -> None:
    drifts = {str(parallel): _drift(pool, ranks, parallel) for ranks, parallel in SUMS}
    assert max(drifts.values()) <= SAME_SUM, drifts
    assert _drift(pool, 1, {}, broken=True) > VISIBLE_SUM


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
    assert abs(fused[1] - exact[1]) <= abs(plain[1] - exact[1]) + NEAR_SUM * exact[1]
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
