"""Reductions begin before the backward ends, and gathers as far ahead as they are told to; sums stay the same."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from dist_llm.config.run import RunConfig
from dist_llm.parallel import replicas
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.ledger import Ledger
from tests.parallel.test_accounting import assert_equal, measured_and_formula
from tests.parallel.tiny import MOE, build, curve, largest_gap, random_batch, tiny_config
from tests.tolerances import FP64_FEW_STEPS

WIDE: dict[str, object] = {"hidden_size": 128, "ffn_hidden_size": 512, "vocab_size": 3000}
"""A model whose gradients fill several buckets of 1 MiB."""


def events_of_a_step(config: RunConfig) -> list[str]:
    """Return the order of buckets that are sent, and of the gradient that is computed last."""
    engine = build(config)
    events: list[str] = []
    table = engine.shards[0]
    table.parameter.register_hook(lambda grad: events.append(f"gradient of {table.name}"))
    begin_sum = replicas.begin_sum

    def begin(flat: Tensor, axis: Any) -> Any:
        events.append("bucket")
        return begin_sum(flat, axis)

    with patch.object(replicas, "begin_sum", begin):
        engine.train_step(random_batch(config, engine.data_slice, 0))
    return events


def test_buckets_travel_while_the_last_backward_runs(pool: WorkerPool) -> None:
    config = tiny_config({"zero": 0, "bucket_mib": 1}, WIDE)
    first, second = pool.run(events_of_a_step, config, world=2)
    assert first == second
    microbatches = config.data.global_batch // 2
    last = len(first) - 1 - first[::-1].index("gradient of embed.tokens.weight")
    assert first.count("gradient of embed.tokens.weight") == microbatches
    assert set(first[: first.index("bucket")]) == {"gradient of embed.tokens.weight"}
    assert first[: first.index("bucket")].count("gradient of embed.tokens.weight") == microbatches - 1
    assert first[:last].count("bucket") >= 3
    assert first[last + 1 :].count("bucket") == 1


OVERLAPPED = [
    (2, {"zero": 0}, WIDE),
    (4, {"zero": 0, "tensor": 2, "sequence": True}, WIDE),
    (4, {"zero": 0, "pipeline": 2}, WIDE),
    (
        4,
        {"zero": 0, "pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"},
        {**WIDE, "tie_embeddings": False},
    ),
    (4, {"zero": 0, "pipeline": 2, "schedule": "zbv"}, WIDE),
    (4, {"zero": 0, "expert": 2}, {**WIDE, **MOE}),
]


@pytest.mark.parametrize(("ranks", "parallel", "model"), OVERLAPPED, ids=str)
def test_several_buckets_equal_the_formulas(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object]
) -> None:
    config = tiny_config({**parallel, "bucket_mib": 1}, model)
    assert_equal(pool.run(measured_and_formula, config, world=ranks), dropless="expert" in parallel)


UNITS = [
    (2, {"zero": 1, "unit_blocks": 2}, {}, "fp32"),
    (2, {"zero": 3, "unit_blocks": 3, "prefetch": 0}, {"tie_embeddings": False}, "bf16"),
    (2, {"zero": 3, "unit_blocks": 4, "recompute": "full"}, {}, "fp32"),
    (2, {"zero": 3, "prefetch": 3}, {}, "fp32"),
    (4, {"zero": 2, "unit_blocks": 2, "replicate": 2}, {}, "fp32"),
    (4, {"zero": 3, "unit_blocks": 2, "prefetch": 2, "pipeline": 2}, {"tie_embeddings": False}, "fp32"),
    (4, {"zero": 3, "unit_blocks": 2, "pipeline": 2, "schedule": "zero_bubble", "offload": "parameters"}, {}, "fp32"),
    (4, {"zero": 3, "unit_blocks": 2, "prefetch": 2, "expert": 2, "recompute": "full"}, MOE, "fp32"),
    (4, {"zero": 3, "prefetch": 0, "expert": 2}, MOE, "fp32"),
]


@pytest.mark.parametrize(("ranks", "parallel", "model", "precision"), UNITS, ids=str)
def test_units_of_several_blocks_equal_the_formulas(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    config = tiny_config(parallel, model, precision={"name": precision})
    assert_equal(pool.run(measured_and_formula, config, world=ranks), dropless="expert" in parallel)


@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "experts"])
def test_units_change_no_number(pool: WorkerPool, model: dict[str, object]) -> None:
    one = pool.run(curve, tiny_config({}, model, precision={"name": "fp64"}), 3, world=1)[0]
    for ranks, more in (
        (2, {"zero": 3, "prefetch": 2}),
        (2, {"zero": 2, "prefetch": 0}),
        (4, {"zero": 3, "pipeline": 2, "schedule": "zbv", "recompute": "full"}),
    ):
        config = tiny_config({"unit_blocks": 2, **more}, model, precision={"name": "fp64"})
        for ours in pool.run(curve, config, 3, world=ranks):
            assert largest_gap(ours, one) <= FP64_FEW_STEPS, more


class _Sequence(Ledger):
    """Keeps the order of gathers among the blocks that begin to compute."""

    def __init__(self, mesh: Any) -> None:
        super().__init__(mesh)
        self.events: list[str] = []

    def _record(self, name: str, args: Any) -> None:
        super()._record(name, args)
        self.events += ["gather"] if name == "c10d._allgather_base_.default" else []


def gathers_before_blocks(config: RunConfig) -> list[int]:
    """Return how many units have been gathered when each block of a forward begins to compute."""
    engine = build(config)
    model: Any = engine.stages[0].part.model
    with _Sequence(engine._mesh) as ledger:
        for layer in model.layers.values():
            layer.attention_norm.register_forward_pre_hook(lambda module, args: ledger.events.append("block"))
        engine.eval_step(random_batch(config, engine.data_slice, 0))
    blocks = [at for at, event in enumerate(ledger.events) if event == "block"]
    return [ledger.events[:at].count("gather") for at in blocks[: len(model.layers)]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prefetch": 0}, [2, 3, 4, 5]),
        ({"prefetch": 1}, [3, 4, 5, 6]),
        ({"prefetch": 2}, [4, 5, 6, 6]),
        ({"unit_blocks": 2, "prefetch": 0}, [2, 2, 3, 3]),
        ({"unit_blocks": 2, "prefetch": 1}, [3, 3, 4, 4]),
    ],
    ids=str,
)
def test_units_are_gathered_as_far_ahead_as_asked(
    pool: WorkerPool, settings: dict[str, object], expected: list[int]
) -> None:
    """An embedding, four blocks and a head: the first block is the second unit."""
    config = tiny_config({"zero": 3, **settings}, {"tie_embeddings": False}, {"microbatch": 4})
    assert pool.run(gathers_before_blocks, config, world=2)[0] == expected
