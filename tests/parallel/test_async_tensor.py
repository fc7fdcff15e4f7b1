"""Asynchronous tensor parallelism: the code that joins products and collectives, over torch's own plain versions."""

from __future__ import annotations

import pytest
from torch.distributed import _symmetric_memory as symmetric

from dist_llm.config.run import RunConfig
from dist_llm.parallel import async_tensor
from dist_llm.parallel.async_tensor import AsyncColumnLinear, AsyncRowLinear
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.tiny import GPT2, MOE, Curve, build, curve, largest_gap, random_batch, tiny_config
from tests.tolerances import FP64_FEW_STEPS, VISIBLE

LAYOUTS: list[tuple[int, dict[str, object], dict[str, object]]] = [
    (2, {}, {}),
    (2, {}, GPT2),
    (2, {}, MOE),
    (4, {"zero": 3, "recompute": "full"}, GPT2),
    (4, {"pipeline": 2, "schedule": "zbv", "zero": 2}, {}),
]


def joined_curve(config: RunConfig, wrong: bool = False) -> tuple[int, Curve]:
    """Train with the joined operations as torch has them for other devices; return how many modules use them."""
    kept = async_tensor.share_memory, async_tensor.gather_products, async_tensor.product_scatter

    def gather(x, matrices, axis):  # type: ignore[no-untyped-def]
        return symmetric._fused_all_gather_matmul_fallback(x, matrices, 1, axis.group.group_name)

    def scatter(x, matrix, axis):  # type: ignore[no-untyped-def]
        out = symmetric._fused_matmul_reduce_scatter_fallback(x, matrix, "sum", 1, axis.group.group_name)
        return out / axis.size if wrong else out

    async_tensor.share_memory = lambda group, device: True
    async_tensor.gather_products, async_tensor.product_scatter = gather, scatter
    try:
        engine = build(config)
        modules = [module for stage in engine.stages for module in stage.part.model.modules()]
        used = sum(isinstance(module, AsyncColumnLinear | AsyncRowLinear) for module in modules)
        results = [engine.train_step(random_batch(config, engine.data_slice, step)) for step in range(3)]
        return used, [(result.loss, result.grad_norm) for result in results]
    finally:
        async_tensor.share_memory, async_tensor.gather_products, async_tensor.product_scatter = kept


def config_of(parallel: dict[str, object], model: dict[str, object]) -> RunConfig:
    """Return an fp64 run with sequence parallelism and its collectives joined to products."""
    split = {"tensor": 2, "sequence": True, "async_tensor": True, **parallel}
    return tiny_config(split, model, precision={"name": "fp64"})


@pytest.mark.parametrize(("ranks", "parallel", "model"), LAYOUTS, ids=str)
def test_joined_operations_agree_in_fp64(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object]
) -> None:
    one = pool.run(curve, tiny_config({}, model, precision={"name": "fp64"}), 3, world=1)[0]
    for used, ours in pool.run(joined_curve, config_of(parallel, model), world=ranks):
        assert used
        assert largest_gap(ours, one) <= FP64_FEW_STEPS


def test_a_wrong_scatter_would_show(pool: WorkerPool) -> None:
    one = pool.run(curve, tiny_config({}, precision={"name": "fp64"}), 3, world=1)[0]
    _, ours = pool.run(joined_curve, config_of({}, {}), True, world=2)[0]
    assert largest_gap(ours, one) > VISIBLE


def test_without_shared_memory_the_plain_collectives_serve(pool: WorkerPool) -> None:
    plain = {"tensor": 2, "sequence": True}
    assert pool.run(curve, tiny_config({**plain, "async_tensor": True}), 2, world=2) == pool.run(
        curve, tiny_config(plain), 2, world=2
    )
