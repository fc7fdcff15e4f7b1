"""The cost model sends what the engine sends: its collectives, counted by what each costs when only latency does."""

from __future__ import annotations

import pytest

from dist_llm.accounting.memory import place_of
from dist_llm.accounting.traffic import Shapes, step_traffic
from dist_llm.cli.rows import read_row
from dist_llm.config.run import RunConfig
from dist_llm.planner.cost.collectives import group_of, latency_seconds
from dist_llm.planner.cost.hardware import fabric_of
from dist_llm.planner.cost.step import predict_step

BASE: dict[str, object] = {
    "cluster": "h100-sxm",
    "cluster.link_gb_per_second": 1e12,
    "cluster.link_microseconds": 1e6,
    "model.family": "llama",
    "model.num_layers": 8,
    "model.hidden_size": 1024,
    "data.seq_len": 1024,
    "data.global_batch": 8,
    "data.microbatch": 1,
}


def counted(config: RunConfig, axis: str) -> dict[str, int]:
    """Return the collectives of a rank in a step over an axis, by kind, as the engine issues them."""
    parallel = config.parallel
    place = place_of(parallel, parallel.data or 1, 0, 0)
    traffic = step_traffic(Shapes(config.model, parallel, config.precision, config.data, place, parallel.data or 1))
    return {kind: count for (on, kind), count in traffic.counts.items() if on == axis}


def foretold(overrides: dict[str, object], axis_ranks: int, component: str) -> float:
    """Return the collectives that the cost model counts: its seconds over those of an empty one."""
    config, ranks = read_row(BASE | overrides)
    fabric = fabric_of(config.cluster, 8)
    step = predict_step(config, ranks)
    without = config.model_copy(update={"cluster": config.cluster.model_copy(update={"link_microseconds": 0.0})})
    free = predict_step(without, ranks).components
    spent = sum(step.components[name] - free[name] for name in (component, "recompute"))
    return spent / latency_seconds(fabric, group_of(fabric, axis_ranks, 1))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks(recompute: str, sequence: bool) -> None:
    overrides: dict[str, object] = {
        "parallel.tensor": 4,
        "parallel.sequence": sequence,
        "parallel.recompute": recompute,
        "parallel.data": 1,
    }
    config, _ = read_row(BASE | overrides)
    # What completes the gradients of norms, one bucket a step, is left out of the cost: it carries next to nothing.
    assert foretold(overrides, 4, "tensor_comm") == pytest.approx(sum(counted(config, "tp").values()) - sequence)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_expert_ranks(recompute: str) -> None:
    overrides: dict[str, object] = {
        "model.moe.num_experts": 8,
        "parallel.expert": 4,
        "parallel.data": 4,
        "parallel.recompute": recompute,
    }
    config, _ = read_row(BASE | overrides)
    exchanges = counted(config, "ep")["all_to_all"]
    # Counts of rows, 8 bytes an expert, go before them and are left out of the cost.
    calls = config.model.num_layers * 2
    counts = calls * (2 if recompute == "full" else 1)
    assert foretold(overrides, 4, "expert_comm") == pytest.approx(exchanges - counts)


def test_exchange_of_heads() -> None:
    overrides: dict[str, object] = {"parallel.context": 4, "parallel.context_method": "ulysses", "parallel.data": 1}
    config, _ = read_row(BASE | overrides)
    assert foretold(overrides, 4, "context_comm") == pytest.approx(counted(config, "cp")["all_to_all"])
