"""`verify layout` says where a layout first differs: of planted faults it names step, phase, parameter and axis."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from dist_llm.config.run import RunConfig
from dist_llm.engine.native import NativeEngine
from dist_llm.parallel import replicas
from dist_llm.runtime.mesh import Axis
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.compare import compare
from dist_llm.train.divergence import first_divergence
from dist_llm.train.layouts import Case, baseline, case_config
from dist_llm.train.trace import Trace, train_case
from dist_llm.train.verify import refusal
from tests.golden.curves import EOS, write_tokens
from tests.parallel.faults import FAULTS, Fault, Home, planted
from tests.parallel.tiny import tiny_config

EXPECTED: dict[str, tuple[str, str, str]] = {
    "tp all-reduce dropped": ("forward", "embed", "tp"),
    "gradient scaled by ranks": ("gradient", "embed.tokens.weight", "dp"),
    "bucket sent before the last backward": ("gradient", "embed.tokens.weight", "dp"),
    "ZeRO averages gradients": ("gradient", "embed.tokens.weight", "dp"),
    "norm counts replicas": ("gradient", "the norm of all", "tp"),
    "tied copies drift apart": ("gradient", "embed.tokens.weight", "pp"),
    "second half of a backward run twice": ("gradient", "embed.tokens.weight", "pp"),
    "second half of experts run twice": ("gradient", "layers.1.mlp.experts.gate.weight", "pp"),
    "ring merges without weights": ("forward", "layers.0.attention", "cp"),
    "chunks of the sequence swapped": ("forward", "layers.0.attention", "cp"),
    "ulysses mixes up positions": ("forward", "layers.0.attention", "cp"),
    "ulysses repeats the wrong key heads": ("forward", "layers.0.attention", "cp"),
    "ring turned among those who exchange heads": ("forward", "layers.0.attention", "cp"),
    "heads come back in another order": ("forward", "layers.0.attention", "cp"),
    "documents of another ring rank": ("forward", "layers.0.attention", "cp"),
    "rows come back to other tokens": ("forward", "layers.1.mlp", "ep"),
    "expert gradients not summed": ("gradient", "layers.1.mlp.experts.gate.weight", "dp"),
    "balance loss sees a part of the sequence": ("gradient", "embed.tokens.weight", "cp"),
    "router losses counted by every tp rank": ("gradient", "embed.tokens.weight", "tp"),
    "bias moved by one rank's counts": ("update", "layers.2.mlp.router.bias", "dp"),
    "learning rate by a shard's fan-in": ("update", "layers.0.attention.wo.weight", "tp"),
}
"""By fault: phase, the first parameter (or part) in forward order, axis.

Of layer 1 the counts of one rank happen to move the bias as those of all do.
"""
BY_AXIS = {
    "data": ("gradient", "embed.tokens.weight", "dp"),
    "tensor": ("gradient", "layers.0.attention_norm.weight", "tp"),
    "pipeline": ("gradient", "embed.tokens.weight", "pp"),
}
"""Of the all-reduce that completes gradients, by the axis over which it is dropped."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_tokens(tmp_path_factory.mktemp("divergence")))


def ends_document(fault: Fault) -> int:
    """Return the token after which another document begins: a space where documents must be many."""
    return ord(" ") if fault.documents else EOS


def broken_case(fault: Fault, config: RunConfig, prefix: Path, steps: int, look: int) -> Trace:
    """Train with a fault."""
    with planted(fault.name):
        return train_case(config, prefix, ends_document(fault), steps, look)


def sizes(fault: Fault) -> dict[str, object]:
    """Return the layout of a fault with its data axis."""
    ranks = 1
    for key in ("tensor", "pipeline", "context"):
        ranks *= int(str(fault.parallel.get(key, 1)))
    return {**fault.parallel, **({"data": fault.ranks // ranks} if fault.ranks > ranks else {})}


def search(pool: WorkerPool, prefix: Path, fault: Fault, case: Case, steps: int = 2) -> dict[str, object] | None:
    """Return where a case with a fault first differs from one process without."""
    config = tiny_config(
        {}, {**fault.model, "vocab_size": EOS + 1}, {"microbatch": 2, "document_mask": fault.documents}
    )

    def run(case: Case, steps: int, look: int) -> list[Trace]:
        layout = case_config(config, case, "fp64")
        if case.ranks == 1:
            return pool.run(train_case, layout, prefix, ends_document(fault), steps, look, world=1)
        return pool.run(partial(broken_case, fault), layout, prefix, steps, look, world=case.ranks)

    def is_legal(case: Case) -> bool:
        return not refusal(config, case, "fp64")

    return first_divergence(run, is_legal, case, config.model, steps, "fp64")


ONE_OF_A_KIND = (
    "tp all-reduce dropped",
    "gradient all-reduce dropped",
    "norm counts replicas",
    "second half of a backward run twice",
    "ring merges without weights",
    "rows come back to other tokens",
    "bias moved by one rank's counts",
)


def _marked(fault: Fault) -> object:
    """Leave to `make full` the faults of whose kind there is another."""
    marks = () if fault.name in ONE_OF_A_KIND else (pytest.mark.slow,)
    return pytest.param(fault, marks=marks, id=f"{fault.name} {fault.parallel}")


@pytest.mark.parametrize("fault", [_marked(fault) for fault in FAULTS])
def test_a_fault_is_located(pool: WorkerPool, prefix: Path, fault: Fault) -> None:
    parallel = sizes(fault)
    accumulation = 8 // max(2, int(str(parallel.get("data", 1))))
    found = search(pool, prefix, fault, Case("as-given", parallel, fault.ranks, accumulation))
    assert found is not None
    axis = next((key for key in ("tensor", "pipeline", "data") if key in parallel), "")
    phase, parameter, over = EXPECTED.get(fault.name) or BY_AXIS[axis]
    assert (found["step"], found["phase"], found["parameter"], found["axis"]) == (1, phase, parameter, over), found


def test_a_mix_is_taken_apart(pool: WorkerPool, prefix: Path) -> None:
    """The ring alone is broken: the other axis goes, it stays."""
    fault = Fault("ring merges without weights", 4, {})
    case = Case("as-given", {"tensor": 2, "context": 2, "zero": 0}, 4, 4)
    found = search(pool, prefix, fault, case)
    assert found is not None
    assert (found["axis"], found["smallest_layout"]) == ("cp", "context=2 zero=0")


def late_case(config: RunConfig, prefix: Path, steps: int, look: int) -> Trace:
    """Train with a gradient all-reduce that is dropped from the third step on."""
    finish, begin_sum = NativeEngine.finish_gradients, replicas.begin_sum
    finished: list[NativeEngine] = []

    def count(engine: NativeEngine) -> None:
        finish(engine)
        finished.append(engine)

    def begin(flat: Tensor, axis: Axis) -> Any:
        return Home() if len(finished) >= 2 else begin_sum(flat, axis)

    with patch.object(NativeEngine, "finish_gradients", count), patch.object(replicas, "begin_sum", begin):
        return train_case(config, prefix, EOS, steps, look)


def test_the_first_step_is_found(pool: WorkerPool, prefix: Path) -> None:
    config = tiny_config({}, {"vocab_size": EOS + 1}, {"microbatch": 2})

    def run(case: Case, steps: int, look: int) -> list[Trace]:
        return pool.run(late_case, case_config(config, case, "fp64"), prefix, steps, look, world=case.ranks)

    case = Case("as-given", {"data": 2, "zero": 0}, 2, 1)
    found = first_divergence(run, lambda case: True, case, config.model, 5, "fp64")
    assert found is not None
    assert (found["step"], found["phase"], found["axis"]) == (3, "gradient", "dp")


def test_a_sound_layout_differs_nowhere(pool: WorkerPool, prefix: Path) -> None:
    fault = Fault("ring merges without weights", 2, {})
    case = Case("as-given", {"tensor": 2, "sequence": True}, 2, 2)
    assert search(pool, prefix, fault, case) is None


SEEN_IN_BF16 = (
    "tp all-reduce dropped",
    "gradient all-reduce dropped {'tensor': 2, 'sequence': True}",
    "gradient all-reduce dropped {'pipeline': 2}",
    "ZeRO averages gradients",
    "second half of a backward run twice",
)
"""A dropped all-reduce, a missing norm sync, a tied pair apart, a wrong scale, and a gradient taken twice."""


@pytest.mark.parametrize("name", SEEN_IN_BF16)
def test_the_bounds_of_bf16_are_tight_enough(pool: WorkerPool, prefix: Path, name: str) -> None:
    fault = next(fault for fault in FAULTS if f"{fault.name} {fault.parallel}".startswith(name))
    config = tiny_config({}, {"vocab_size": EOS + 1}, {"microbatch": 2})
    case = Case("as-given", sizes(fault), fault.ranks, 4)
    one = pool.run(train_case, case_config(config, baseline("as-given"), "bf16"), prefix, EOS, 1, 0, world=1)
    layout = case_config(config, case, "bf16")
    sound = pool.run(train_case, layout, prefix, EOS, 1, 0, world=fault.ranks)
    broken = pool.run(partial(broken_case, fault), layout, prefix, 1, 0, world=fault.ranks)
    assert compare(case, sound, one, "bf16", 0.0).ok
    assert not compare(case, broken, one, "bf16", 0.0).ok
