"""Whose software a row of plain keys means, and what the software of 2021 to 2023 did that ours does not.

Facts: Narayanan et al. 2021 (arXiv 2104.04473), 4.1; Korthikanti et al. 2022 (arXiv 2205.05198), equations 1 and 2;
DeepSpeed 0.6, runtime/pipe/schedule.py (what a stage sends and receives before each pass) and bf16_optimizer.py.
"""

from __future__ import annotations

import pytest

from dist_llm.cli.rows import read_row
from dist_llm.planner.cost.collectives import Group, all_reduce_seconds
from dist_llm.planner.cost.hardware import fabric_of
from dist_llm.planner.cost.pipeline import pipeline_seconds
from dist_llm.planner.cost.step import predict_step
from dist_llm.planner.footprint import predict_memory
from dist_llm.planner.practice import gradient_width, is_megatron_deepspeed, keeps_scores, sum_bytes

PLAIN: dict[str, object] = {
    "cluster": "a100-80gb",
    "model.num_layers": 8,
    "model.hidden_size": 2048,
    "parallel.tensor": 2,
    "parallel.pipeline": 4,
    "parallel.data": 2,
    "data.seq_len": 2048,
    "data.global_batch": 32,
    "data.microbatch": 2,
}


@pytest.mark.parametrize(
    ("said", "engine", "zero", "scores"),
    [
        ({}, "megatron", 0, True),
        ({"parallel.zero": 0}, "megatron", 0, True),
        ({"parallel.zero": 1}, "deepspeed", 1, True),
        ({"parallel.zero": 2, "parallel.pipeline": 1}, "deepspeed", 2, True),
        ({"parallel.zero": 1, "parallel.sequence": True}, "megatron", 1, True),
        ({"parallel.zero": 1, "parallel.virtual_pipeline": 2}, "megatron", 1, True),
        ({"parallel.zero": 1, "parallel.recompute": "selective"}, "megatron", 1, True),
        ({"parallel.zero": 3, "parallel.pipeline": 1}, "native", 3, False),
        ({"parallel.schedule": "zero_bubble"}, "native", 0, False),
        ({"data.seq_len": 8192}, "megatron", 0, False),
        ({"parallel.context": 2}, "megatron", 0, False),
        ({"engine": "megatron", "engine.transformer_engine": "auto"}, "megatron", 1, False),
        ({"engine.transformer_engine": "auto"}, "megatron", 0, False),
        ({"engine": "native"}, "native", 1, False),
        ({"engine.name": "deepspeed"}, "deepspeed", 1, True),
        ({"cluster.practice": "native", "parallel.zero": 2}, "native", 2, False),
        ({"cluster": "h100-sxm"}, "native", 1, False),
        ({"cluster": "h100-sxm", "engine": "megatron"}, "megatron", 1, False),
        ({"cluster": "h100-sxm", "engine": "megatron", "engine.transformer_engine": "never"}, "megatron", 1, True),
    ],
)
def test_what_a_row_leaves_out(said: dict[str, object], engine: str, zero: int, scores: bool) -> None:
    config, _ = read_row(PLAIN | said)
    assert (config.engine.name, config.parallel.zero, keeps_scores(config)) == (engine, zero, scores)


def test_gradients_of_that_time() -> None:
    """Bytes an element: what data ranks sum, and what adding one microbatch's gradient moves."""
    expected = {
        ("fp16", 0): (2, 0),
        ("bf16", 0): (4, 0),
        ("fp16", 1): (2, 2 + 2 * 2),
        ("bf16", 1): (4, (2 + 4) + (4 + 2 * 4)),
        ("bf16", 3): (4, 2 + 2 * 4),
    }
    for (precision, zero), found in expected.items():
        split = {"parallel.pipeline": 1} if zero == 3 else {}
        config, _ = read_row(PLAIN | split | {"precision": precision, "parallel.zero": zero})
        assert (gradient_width(config), sum_bytes(config)) == found, (precision, zero)


def step_of_meetings(works: list[tuple[float, float]], microbatches: int, hop: float) -> float:
    """Return the time of a step that walks DeepSpeed's program: a stage waits for each message that it sends or gets.

    works: forward and backward of each stage. Stage s runs microbatch m forward in slot 2 m + s, and back in slot
    2 m + 2 n - 1 - s; before a forward it has the activation of that microbatch come and sends its last gradient;
    before a backward it sends its last activation and has a gradient come.
    """
    count = len(works)
    clock = [0.0] * count

    def microbatch(stage: int, slot: int) -> tuple[bool, int]:
        forward = (slot - stage) % 2 == 0
        place = (slot - stage) // 2 if forward else (slot - (2 * count - 1 - stage)) // 2
        return forward, place

    def there(place: int) -> bool:
        return 0 <= place < microbatches

    for slot in range(2 * (microbatches + count)):
        for stage in range(count - 1):
            forward, place = microbatch(stage, slot)
            below, next_place = microbatch(stage + 1, slot)
            if forward or not below:
                continue
            for sent in (there(next_place), there(place)):
                if sent:
                    clock[stage] = clock[stage + 1] = max(clock[stage], clock[stage + 1]) + hop
        for stage, (ahead, back) in enumerate(works):
            forward, place = microbatch(stage, slot)
            clock[stage] += (ahead if forward else back) * there(place)
    return max(clock)


@pytest.mark.parametrize(
    "works",
    [
        [(1.0, 3.0)] * 2,
        [(1.0, 3.0)] * 6,
        [(1.0, 3.0), (1.1, 3.2), (1.1, 3.2), (1.3, 3.4)],
        [(1.0, 3.0), (1.5, 4.0), (1.0, 3.0), (1.0, 3.0)],
    ],
)
def test_stages_that_wait_for_each_other(works: list[tuple[float, float]]) -> None:
    """The time between microbatches is that of the program, walked; a whole step is as near as its ends let it be."""
    hop, sums = 0.25, tuple(ahead + back for ahead, back in works)
    walked = [step_of_meetings(works, microbatches, hop) for microbatches in (40, 80)]
    found = [
        pipeline_seconds("1f1b", len(works), microbatches, sums, hop, meet=True).seconds for microbatches in (40, 80)
    ]
    free = pipeline_seconds("1f1b", len(works), 80, sums, hop).seconds
    assert found[1] - found[0] == pytest.approx(walked[1] - walked[0])
    assert found[1] == pytest.approx(walked[1], rel=0.02)
    assert found[1] > free


def test_megatron_deepspeed_is_made_of_both() -> None:
    """Activations as Megatron-LM's, state as DeepSpeed's under another practice."""
    both, ranks = read_row(PLAIN | {"parallel.zero": 1, "parallel.recompute": "full"})
    megatron, _ = read_row(PLAIN | {"parallel.zero": 1, "parallel.recompute": "full", "engine": "megatron"})
    ours, _ = read_row(PLAIN | {"parallel.zero": 1, "engine": "deepspeed", "cluster.practice": "native"})
    assert is_megatron_deepspeed(both)
    assert not is_megatron_deepspeed(megatron)
    assert not is_megatron_deepspeed(ours)
    found, layers, state = (predict_memory(each, ranks).ranks[1].components for each in (both, megatron, ours))
    assert (found.activations, found.working, found.buffers) == (layers.activations, layers.working, layers.buffers)
    assert (found.parameters, found.gradients, found.optimizer) == (state.parameters, state.gradients, state.optimizer)


def test_scores_are_counted_in_time_and_in_memory() -> None:
    """Five bytes a score of each layer: softmax, its mask, and what is left after dropout."""
    written, ranks = read_row(PLAIN | {"parallel.pipeline": 1})
    fused, _ = read_row(PLAIN | {"parallel.pipeline": 1, "engine.transformer_engine": "auto"})
    held, without = (predict_memory(each, ranks).ranks[0].components.activations for each in (written, fused))
    out = 2 * 2 * 2048 * 2048 // 2  # one kernel keeps its output a second time
    assert held - without == 8 * (5 * 16 * 2 * 2048**2 // 2 - out)
    slow, quick = (predict_step(each, ranks).components["attention"] for each in (written, fused))
    assert slow > quick


@pytest.mark.parametrize(("said", "shards", "width"), [({}, 1, 2), ({"cluster.practice": "native"}, 2, 4)])
def test_tied_embeddings(said: dict[str, object], shards: int, width: int) -> None:
    """Both ends of a pipeline add up the gradients of the table: all of it then, what ZeRO leaves a rank in ours."""
    row = PLAIN | said | {"parallel.zero": 1, "precision": "fp16"}
    tied, ranks = read_row(row | {"model.tie_embeddings": True})
    untied, _ = read_row(row | {"model.tie_embeddings": False})
    seconds = [predict_step(each, ranks).components["data_comm_exposed"] for each in (tied, untied)]
    table = 51200 // 2 * 2048 + 2048 * 2048  # rows of a tensor rank, and positions
    group, fabric = Group(2, 1), fabric_of(tied.cluster, 8)
    expected = all_reduce_seconds(fabric, group, table * width / shards)
    assert seconds[0] - seconds[1] == pytest.approx(expected, rel=0.01)
