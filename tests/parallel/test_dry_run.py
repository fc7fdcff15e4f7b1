"""What a dry run says of a rank equals what the rank then holds: state exactly, the peak of activations within 5 %."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from dist_llm.accounting.memory import place_of
from dist_llm.accounting.peaks import gathered_bytes, gradient_bytes
from dist_llm.accounting.stages import plan_stages
from dist_llm.config.run import RunConfig
from dist_llm.engine.native import NativeEngine
from dist_llm.parallel.activations import ActivationLog
from dist_llm.parallel.live import _fsdp_groups, gradients, host_bytes, parameters, storage_bytes
from dist_llm.parallel.whole_gradients import IN_GRAD
from dist_llm.runtime.fake_group import fake_group
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.dry_run import dry_run, state_groups
from tests.parallel.tiny import GPT2, MOE, build, random_batch, tiny_config


def measured(config: RunConfig) -> dict[str, int]:
    """Train two steps on this rank; return bytes of its shards, its optimizer and the second step's activations."""
    engine = build(config)
    log = ActivationLog(state_groups(engine._mesh))

    def observe(phase: str) -> None:
        for stage in engine.stages:
            log.exclude((*parameters(stage.part.model), *gradients(stage.part.model)))

    engine.observe = observe
    with log:
        engine.train_step(random_batch(config, engine.data_slice, 0))
        start = log.mark()
        engine.train_step(random_batch(config, engine.data_slice, 1))
    offload = config.parallel.offload
    moments = storage_bytes(t for slot in engine.optimizer.slots for t in (slot.exp_avg, slot.exp_avg_sq))
    if offload == "parameters":
        moments += sum(host_bytes(stage.part.model) for stage in engine.stages)
    return {
        "pipeline_rank": engine._mesh.pp.index,
        "param_bytes": storage_bytes(shard.tensor for shard in engine.shards) * (offload != "parameters"),
        "optimizer_bytes": moments * (offload == "none"),
        "host_bytes": storage_bytes(engine.optimizer.host_tensors) + moments * (offload == "parameters"),
        "peak_activation_bytes": log.peak(start, log.mark()),
    }


class _State(TorchDispatchMode):
    """Looks after every operation at what is gathered and what gradients there are, and keeps the most."""

    def __init__(self, engine: NativeEngine) -> None:
        super().__init__()
        self._stages, self._looking = engine.stages, False
        self.gathered = self.gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._looking:
            self._looking = True
            for stage in self._stages:
                model = stage.part.model
                coming = [getattr(group, "_all_gather_result", None) for group in _fsdp_groups(model)]
                flat = [result.all_gather_output for result in coming if result is not None]
                stored = storage_bytes(shard.tensor for shard in stage.shards)
                self.gathered = max(self.gathered, storage_bytes([*parameters(model), *flat]) - stored)
                self.gradients = max(self.gradients, storage_bytes(gradients(model)))
            self._looking = False
        return out


STATES = [
    ({"zero": 3}, {}, "fp32"),
    ({"zero": 3, "prefetch": 0}, {"tie_embeddings": False}, "fp32"),
    pytest.param(
        {"zero": 3, "prefetch": 2, "unit_blocks": 2}, {**MOE, "tie_embeddings": False}, "fp32", marks=pytest.mark.slow
    ),
    pytest.param({"zero": 3, "expert": 2}, MOE, "fp32", marks=pytest.mark.slow),
    ({"zero": 2}, {}, "fp32"),
    ({"zero": 1}, {}, "bf16"),
]


@pytest.mark.parametrize(("parallel", "model", "precision"), STATES, ids=str)
def test_what_is_gathered_and_accumulated_at_most(
    parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    """On a group that moves nothing. Under ZeRO 1 and 2 what is unpacked in a first forward is not counted twice."""
    config = tiny_config(parallel, model, {"microbatch": 2}, precision={"name": precision})
    with fake_group(2, 0):
        engine = build(config)
        engine.train_step(random_batch(config, engine.data_slice, 0))
        with _State(engine) as state:
            engine.train_step(random_batch(config, engine.data_slice, 1))
        engine.close()
    place, stage = place_of(config.parallel, 2, 0, 0), plan_stages(config.model, 1)[0]
    sections = (config.model, config.parallel, config.precision, place, stage)
    assert gradient_bytes(config, place, stage, 2, 2, IN_GRAD) == pytest.approx(state.gradients, rel=0.05)
    gathered = gathered_bytes(*sections)
    if config.parallel.zero == 3:
        assert gathered == pytest.approx(state.gathered, rel=0.05)
    else:
        assert gathered < state.gathered < 1.5 * gathered


def added(rows: list[dict[str, dict[str, dict[str, int]]]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return the sum of traffic by axis and kind."""
    total: dict[str, dict[str, dict[str, int]]] = {}
    for axis, kind, figures in (
        (axis, kind, f) for row in rows for axis, kinds in row.items() for kind, f in kinds.items()
    ):
        entry = total.setdefault(axis, {}).setdefault(kind, dict.fromkeys(figures, 0))
        for name, figure in figures.items():
            entry[name] += figure
    return total


WIDE: dict[str, object] = {"hidden_size": 64, "ffn_hidden_size": 160}
CASES = [
    (1, {}, {}, "fp32"),
    (1, {"recompute": "full"}, WIDE, "fp32"),
    (2, {"zero": 1}, {}, "bf16"),
    (2, {"zero": 3}, {**GPT2, **WIDE, "num_kv_heads": None}, "fp32"),
    (2, {"zero": 1, "offload": "optimizer"}, WIDE, "bf16"),
    (2, {"zero": 3, "offload": "parameters"}, WIDE, "fp32"),
    (2, {"zero": 0}, WIDE, "fp32"),
    (2, {"tensor": 2, "sequence": True}, WIDE, "bf16"),
    (2, {"context": 2}, WIDE, "fp32"),
    (4, {"pipeline": 4, "zero": 0}, WIDE, "fp32"),
    (4, {"pipeline": 2, "zero": 2}, WIDE, "bf16"),
    (2, {"pipeline": 2, "schedule": "gpipe"}, {"vocab_size": 1000}, "fp32"),
    (2, {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}, WIDE, "fp32"),
    (4, {"pipeline": 2, "schedule": "zero_bubble", "zero": 1}, WIDE, "fp32"),
    (2, {"pipeline": 2, "schedule": "zbv"}, WIDE, "fp32"),
    (2, {"pipeline": 2, "schedule": "dualpipev"}, WIDE, "fp32"),
]


@pytest.mark.parametrize(("ranks", "parallel", "model", "precision"), CASES, ids=str)
def test_a_dry_run_foretells_what_ranks_hold(
    pool: WorkerPool, ranks: int, parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    config = tiny_config(parallel, model, {"microbatch": 1, "global_batch": 8}, precision={"name": precision})
    built = dry_run(config, ranks)
    rows: Any = built["pipeline_ranks"]
    seen = pool.run(measured, config, world=ranks)
    stages: Any = built["stages"]
    for row in rows:
        ours = [stage["traffic"] for stage in stages if stage["pipeline_rank"] == row["pipeline_rank"]]
        assert added(ours) == row["traffic"]
        here = next(rank for rank in seen if rank["pipeline_rank"] == row["pipeline_rank"])
        assert here["param_bytes"] == row["param_bytes"]
        assert here["optimizer_bytes"] == row["optimizer_bytes"]
        assert here["host_bytes"] == row["host_bytes"]
        assert row["peak_activation_bytes"] == pytest.approx(here["peak_activation_bytes"], rel=0.05)
