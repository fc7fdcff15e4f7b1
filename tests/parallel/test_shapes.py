"""The shapes that signatures promise hold on every rank, and a wrong one is refused."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from dist_llm.ops.rms_norm import rms_norm
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.tiny import GPT2, MOE, curve, tiny_config


@pytest.fixture(scope="module")
def checked() -> Iterator[WorkerPool]:
    """A pool whose ranks check shapes at every call."""
    with pytest.MonkeyPatch.context() as patch, WorkerPool(4, timeout_seconds=60.0) as workers:
        patch.setenv("CHECK_SHAPES", "1")
        yield workers


def wrong_shape() -> str:
    """Return how a norm over 3 features takes a weight of 4."""
    try:
        rms_norm(torch.zeros(2, 3), torch.ones(4), 1e-6)
    except jaxtyping.TypeCheckError:
        return "refused"
    return "taken"


def test_a_wrong_shape_is_refused_here_and_on_a_rank(checked: WorkerPool) -> None:
    assert wrong_shape() == "refused"
    assert checked.run(wrong_shape, world=1) == ["refused"]


def test_a_wrong_dtype_is_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        rms_norm(torch.zeros(2, 3, dtype=torch.int64), torch.ones(3), 1e-6)


def test_shapes_of_experts_and_context_hold(checked: WorkerPool) -> None:
    for context, method, heads in ((2, "ring", 1), (2, "ulysses", 1), (4, "mixed", 2)):
        sizes = {"context": context, "context_method": method, "context_heads": heads}
        config = tiny_config({**sizes, "expert": 4, "zero": 1}, MOE, {"document_mask": method != "ulysses"})
        assert len(checked.run(curve, config, 1, world=4)) == 4


@pytest.mark.parametrize("model", [{}, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("sequence", [False, True])
def test_shapes_hold_on_every_rank(checked: WorkerPool, model: dict[str, object], sequence: bool) -> None:
    parallel = {"tensor": 2, "pipeline": 2, "sequence": sequence, "zero": 1}
    config = tiny_config(parallel, model, {"document_mask": not sequence})
    assert len(checked.run(curve, config, 1, world=4)) == 4
