"""What must hold of any cost, whatever the figures: bounds, orders, and sums."""

from __future__ import annotations

from random import Random

import pytest

from dist_llm.accounting.schedules import Pipe, Work
from dist_llm.cli.compose import compose, list_presets
from dist_llm.cli.rows import read_row
from dist_llm.config.cluster import ClusterConfig
from dist_llm.config.decode import decode
from dist_llm.errors import ConfigError
from dist_llm.planner.cost.collectives import all_reduce_seconds, gather_seconds, group_of
from dist_llm.planner.cost.hardware import device_of, fabric_of
from dist_llm.planner.cost.matmul import matmul_seconds
from dist_llm.planner.cost.pipeline import pipeline_seconds
from dist_llm.planner.cost.step import COMPONENTS, even_sizes, predict_step
from dist_llm.planner.schedule_trace import trace_schedule

CLUSTERS = list_presets()["cluster"]

LAYOUTS: list[dict[str, object]] = [
    {"parallel.data": 8, "parallel.zero": 0},
    {"parallel.data": 8, "parallel.zero": 3},
    {"parallel.data": 8, "parallel.zero": 3, "parallel.replicate": 2},
    {"parallel.tensor": 4, "parallel.sequence": True, "parallel.data": 2},
    {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.data": 2, "parallel.recompute": "full"},
    {"parallel.pipeline": 4, "parallel.virtual_pipeline": 2, "parallel.data": 2},
    {"parallel.pipeline": 4, "parallel.schedule": "zero_bubble", "parallel.data": 2},
    {"parallel.pipeline": 2, "parallel.schedule": "zbv", "parallel.data": 4},
    {"parallel.context": 2, "parallel.data": 4, "parallel.recompute": "selective"},
    {"parallel.context": 2, "parallel.context_method": "ulysses", "parallel.data": 4},
]

MODEL: dict[str, object] = {
    "cluster": "a100-80gb",
    "model.family": "llama",
    "model.num_layers": 16,
    "model.hidden_size": 2048,
    "data.seq_len": 2048,
    "data.global_batch": 64,
    "data.microbatch": 2,
}

EXPERTS: dict[str, object] = {
    "model.moe.num_experts": 8,
    "model.moe.top_k": 2,
    "parallel.data": 8,
    "parallel.expert": 4,
}


def cluster(name: str) -> ClusterConfig:
    """Return a preset."""
    return decode(compose([f"cluster={name}"])).cluster


def seconds(**changes: object) -> float:
    """Return the time of a step; `__` in a name stands for a dot."""
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return predict_step(*read_row(MODEL | {"parallel.data": 8} | given)).seconds


@pytest.mark.parametrize("name", CLUSTERS)
def test_no_product_beats_the_peak(name: str) -> None:
    random = Random(0)
    preset = cluster(name)
    device = device_of(preset, "bf16")
    for _ in range(300):
        rows, inner, columns = (2 ** random.randint(3, 14) for _ in range(3))
        reached = 2 * rows * inner * columns / matmul_seconds(device, rows, inner, columns)
        assert reached <= preset.peak_tflops.bf16 * 1e12


def test_large_products_come_near_the_rate() -> None:
    device = device_of(cluster("a100-80gb"), "bf16")
    assert 2 * 8192**3 / matmul_seconds(device, 8192, 8192, 8192) > 0.9 * device.matmul_flops


def test_rows_that_miss_the_matrix_units_are_slow() -> None:
    device = device_of(cluster("a100-80gb"), "bf16")
    assert matmul_seconds(device, 4096, 4100, 4096) > 4 * matmul_seconds(device, 4096, 4096, 4096)


def test_collectives_of_one_rank_are_free() -> None:
    fabric = fabric_of(cluster("h100-sxm"), 8)
    alone = group_of(fabric, 1, 1)
    assert all_reduce_seconds(fabric, alone, 1e9) == gather_seconds(fabric, alone, 1e9) == 0.0


def test_an_all_reduce_is_at_most_its_two_halves() -> None:
    for name in CLUSTERS:
        fabric = fabric_of(cluster(name), 8)
        for ranks in (2, 8, 16, 128):
            group = group_of(fabric, ranks, 1)
            halves = 2 * gather_seconds(fabric, group, 1e8)
            assert all_reduce_seconds(fabric, group, 1e8) <= halves


def test_switches_speed_up_all_reduces_alone() -> None:
    plain = cluster("h100-sxm")
    without = fabric_of(plain.model_copy(update={"reduces_in_switch": False}), 8)
    fabric = fabric_of(plain, 8)
    group = group_of(fabric, 8, 1)
    assert all_reduce_seconds(fabric, group, 1e9) < all_reduce_seconds(without, group, 1e9)
    assert gather_seconds(fabric, group, 1e9) == gather_seconds(without, group, 1e9)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 7), (4, 4), (4, 32), (8, 16)])
def test_bubble_of_even_stages(schedule: str, ranks: int, microbatches: int) -> None:
    found = pipeline_seconds(schedule, ranks, microbatches, (3.0,) * ranks, 0.0)
    assert found.bubble / found.seconds == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@pytest.mark.parametrize("chunks", [2, 3])
def test_bubble_of_interleaved_stages(chunks: int) -> None:
    found = pipeline_seconds("interleaved", 4, 8, (3.0,) * 4 * chunks, 0.0)
    assert found.bubble / found.seconds == pytest.approx(3 / (8 * chunks + 3))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"])
def test_pipeline_is_its_trace(schedule: str) -> None:
    chunks = 2 if schedule in ("interleaved", "zbv", "dualpipev") else 1
    for ranks, microbatches in ((2, 4), (4, 8), (4, 16)):
        times = {Work.FORWARD: 1.0, Work.INPUT: 1.0, Work.WEIGHT: 1.0, Work.BACKWARD: 2.0}
        trace = trace_schedule(Pipe(schedule, ranks, chunks, microbatches), times)
        found = pipeline_seconds(schedule, ranks, microbatches, (3.0,) * ranks * chunks, 0.0)
        assert found.seconds == pytest.approx(trace.seconds, rel=0.02), (ranks, microbatches)


def test_a_dear_stage_sets_the_pace() -> None:
    found = pipeline_seconds("1f1b", 4, 100, (1.0, 1.0, 5.0, 1.0), 0.0)
    assert found.seconds == pytest.approx(99 * 5.0 + 8.0)


def test_messages_slow_1f1b() -> None:
    quick, slow = (pipeline_seconds("1f1b", 4, 64, (1.0,) * 4, hop) for hop in (0.0, 0.1))
    assert slow.messages == pytest.approx(slow.seconds - quick.seconds)
    assert slow.seconds == pytest.approx(quick.seconds + 63 * 2 * 0.1 * 3 / 4 + 6 * 0.1)


@pytest.mark.parametrize("layout", [*LAYOUTS, EXPERTS], ids=str)
def test_components_add_up(layout: dict[str, object]) -> None:
    step = predict_step(*read_row(MODEL | layout))
    assert tuple(step.components) == COMPONENTS
    assert min(step.components.values()) >= 0.0
    assert step.seconds == pytest.approx(sum(step.components.values()))
    assert 0.0 < step.mfu < 1.0


@pytest.mark.parametrize("key", ["link_gb_per_second", "network_gbit_per_second", "memory_gb_per_second"])
@pytest.mark.parametrize("layout", [*LAYOUTS, EXPERTS], ids=str)
def test_more_bandwidth_is_never_slower(layout: dict[str, object], key: str) -> None:
    config, ranks = read_row(MODEL | layout)
    more = config.cluster.model_copy(update={key: 2 * getattr(config.cluster, key)})
    faster = predict_step(config.model_copy(update={"cluster": more}), ranks)
    assert faster.seconds <= predict_step(config, ranks).seconds


def test_more_work_takes_longer() -> None:
    base = seconds()
    assert seconds(data__seq_len=4096) > base
    assert seconds(data__global_batch=128) > base
    assert seconds(model__num_layers=32) > 1.5 * base
    assert seconds(parallel__recompute="full") > base
    assert seconds(parallel__data=4) > base


def test_ranks_of_another_node_are_dearer() -> None:
    tensor = {"parallel__tensor": 16, "model__num_heads": 16, "parallel__data": 1}
    assert seconds(**tensor) > seconds(**tensor, cluster__devices_per_node=16)


def test_batch_must_split() -> None:
    config, _ = read_row(MODEL | {"parallel.data": 8})
    with pytest.raises(ConfigError, match="global_batch"):
        predict_step(config, 3)


def test_even_sizes_put_what_is_left_over_in_the_middle() -> None:
    assert even_sizes(70, 12) == [5, *[6] * 10, 5]
    assert even_sizes(24, 8) == [3] * 8
