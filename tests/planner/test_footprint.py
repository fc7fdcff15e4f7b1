"""Predicted memory: the textbook's facts, the state of accounting/ to the byte, order, and others' measurements.

Facts are of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models": equations 1 to 6,
Figures 1 and 7. Tables of others are read where DIST_LLM_ANCHORS names their folder.
"""

from __future__ import annotations

import statistics
import time
from itertools import product
from pathlib import Path

import pytest

from benchmarks.foresight_memory import KORTHIKANTI, bloom, golden, korthikanti, korthikanti_config
from dist_llm.accounting.memory import place_of, step_bytes
from dist_llm.accounting.schedules import Pipe, stage_rank
from dist_llm.accounting.stage_memory import StageMemory
from dist_llm.config.rule import with_values
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError
from dist_llm.planner.fit_memory import plan_remedies, say_remedies
from dist_llm.planner.footprint import GIB, fits_memory, predict_memory
from dist_llm.planner.messages import write_programs
from dist_llm.planner.native_memory import NativeMemory
from dist_llm.planner.pipeline_memory import most_activations
from dist_llm.planner.pipeline_peaks import RankWork, most_bytes
from tests.parallel.tiny import GPT2, MOE, tiny_config

CUDA: dict[str, object] = {
    "name": "test",
    "device": "cuda",
    "devices_per_node": 8,
    "peak_tflops": {"fp32": 19.5, "bf16": 312.0, "fp16": 312.0, "fp64": 19.5},
    "memory_gib": 79.1,
    "source": "test",
}


@pytest.mark.parametrize("name", KORTHIKANTI)
def test_activations_are_those_of_korthikanti_2022(name: str) -> None:
    """Equations 2, 4 and 6 of the paper, first stage, in s b h bytes; (1 + (p - 1) / (p m)) where interleaved."""
    layers, hidden, heads, tensor, pipeline, chunks, microbatch, _ = KORTHIKANTI[name]
    unit = 2048 * microbatch * hidden * layers * (1 + (pipeline - 1) / (pipeline * chunks) if chunks > 1 else 1)
    scores = 5 * heads * 2048 / (hidden * tensor)
    expected = {
        (False, "none"): 10 + 24 / tensor + scores,
        (True, "none"): 34 / tensor + scores,
        (True, "selective"): 34 / tensor,
        (False, "full"): 2,
    }
    for (sequence, recompute), bytes_each in expected.items():
        config, ranks = korthikanti_config(name, sequence, recompute)
        found = predict_memory(config, ranks).ranks[0].components.activations
        assert found == pytest.approx(bytes_each * unit, rel=0.02), (sequence, recompute)


def test_figure_1_of_korthikanti_2022() -> None:
    """22B keeps 59.25 GiB without recompute and 9.56 GiB with both of the paper's techniques."""
    for way, expected in (((False, "none"), 59.25), ((True, "selective"), 9.5625)):
        config, ranks = korthikanti_config("22B", *way)
        assert predict_memory(config, ranks).ranks[0].components.activations / GIB == pytest.approx(expected, rel=0.01)


STATES = [
    (ranks, {"zero": zero, **parallel}, model, precision)
    for zero, precision in product((0, 1, 2, 3), ("fp32", "bf16"))
    for ranks, parallel, model in (
        (1, {}, {}),
        (3, {}, {"hidden_size": 32, "vocab_size": 50}),
        (8, {"pipeline": 2, "tensor": 2, "sequence": True}, GPT2),
        (8, {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}, {"tie_embeddings": False}),
        (4, {"expert": 2}, MOE),
        (4, {"unit_blocks": 2, "prefetch": 0}, {"num_layers": 23}),
    )
]


@pytest.mark.parametrize(("ranks", "parallel", "model", "precision"), STATES, ids=str)
def test_native_state_is_that_of_accounting(
    ranks: int, parallel: dict[str, object], model: dict[str, object], precision: str
) -> None:
    config = tiny_config(parallel, model, {"global_batch": 24}, precision={"name": precision})
    data = ranks // config.parallel.model_ranks
    for rank in predict_memory(config, ranks).ranks:
        place = place_of(config.parallel, data, rank.pipeline_rank, 0)
        after = step_bytes(config.model, config.parallel, config.precision, place, 2).after_update
        assert (rank.components.parameters, rank.components.optimizer) == (after.parameters, after.optimizer)
        assert rank.components.static >= after.parameters + after.gradients + after.optimizer
        assert rank.components.parameters == sum(stage.parameters for stage in rank.stages.values())


ENGINES = ("native", "deepspeed", "megatron")


def build(engine: str = "native", **changes: object) -> RunConfig:
    """Return a model of 1.2 billion parameters in bf16 on CUDA devices."""
    model = {**GPT2, "num_layers": 16, "hidden_size": 2048, "num_heads": 16, "ffn_hidden_size": 8192}
    config = tiny_config(
        {"tensor": 2, "pipeline": 2},
        {**model, "vocab_size": 50257, "max_seq_len": 2048, "dropout": 0.0},
        {"seq_len": 2048, "global_batch": 64, "microbatch": 2},
        precision={"name": "bf16"},
        cluster=CUDA,
        engine={"name": engine},
    )
    return with_values(config, changes)


def peak(engine: str, **changes: object) -> int:
    """Return the peak of 32 ranks."""
    return predict_memory(build(engine, **changes), 32).peak_bytes


@pytest.mark.parametrize("engine", ENGINES)
def test_more_of_anything_needs_more_and_what_saves_saves(engine: str) -> None:
    base = peak(engine)
    for key, more in (
        ("model.num_layers", 32),
        ("model.vocab_size", 250000),
        ("data.microbatch", 4),
        ("model.ffn_hidden_size", 16384),
    ):
        assert peak(engine, **{key: more}) > base, key
    for key, less in (("parallel.tensor", 4), ("parallel.recompute", "full"), ("parallel.sequence", True)):
        assert peak(engine, **{key: less}) < base, key
    by_zero = [peak(engine, **{"parallel.zero": zero}) for zero in ((0, 1) if engine == "megatron" else (1, 2, 3))]
    assert by_zero == sorted(by_zero, reverse=True)
    assert len(set(by_zero)) == len(by_zero)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_of_equal_stages_holds_the_most_microbatches(engine: str) -> None:
    config = build(engine, **{"parallel.pipeline": 4, "parallel.tensor": 1})
    inner = [rank.components.activations for rank in predict_memory(config, 32).ranks[1:-1]]
    assert inner == sorted(inner, reverse=True)
    assert inner[0] > inner[-1]


def test_what_is_told_adds_up() -> None:
    found = predict_memory(build(), 32)
    told = found.memory_gib()
    components, ranks = told["components"], told["ranks"]
    assert isinstance(components, dict)
    assert isinstance(ranks, list)
    assert sum(components.values()) == pytest.approx(told["peak"])
    assert max(rank["peak"] for rank in ranks) == pytest.approx(told["peak"])
    assert told["largest"] == max(components, key=components.__getitem__)
    worst = found.worst.components
    assert worst.allocated == worst.reserved - worst.fragmentation - worst.reserve
    assert found.fits(found.peak_bytes / GIB)
    assert not found.fits(0.999 * found.peak_bytes / GIB)


def test_a_cpu_holds_tensors_and_the_process() -> None:
    config = tiny_config()
    components = predict_memory(config, 1).worst.components
    assert components.reserve == config.cluster.reserve_gib * GIB
    assert components.reserved - components.reserve == components.allocated
    assert components.allocated == components.static + components.activations + components.logits


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"])
@pytest.mark.parametrize("as_needed", [True, False])
def test_peaks_in_symbols_are_those_of_the_walk(schedule: str, as_needed: bool) -> None:
    chunks = {"interleaved": 3, "zbv": 2, "dualpipev": 2}.get(schedule, 1)
    splits = schedule in ("zero_bubble", "zbv", "dualpipev")
    for microbatches in (8, 64):
        pipe = Pipe(schedule, 4, chunks, microbatches)
        for rank, program in enumerate(write_programs(pipe)):
            stages = [stage for stage in range(4 * chunks) if stage_rank(stage, 4, schedule) == rank]
            memories = {
                stage: StageMemory(120 + stage, 100 + stage, 30, 40, 60 * splits, 10 * splits, 8 * (stage > 0), 8)
                for stage in stages
            }
            work = RankWork(pipe, rank, tuple(stages), splits, as_needed)
            found = most_bytes(work, list(memories.values()))
            assert found == pytest.approx(most_activations(pipe, program, memories, as_needed), rel=0.01)


def test_a_layout_that_one_rank_refutes_asks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    rank = NativeMemory.rank
    monkeypatch.setattr(
        NativeMemory, "rank", lambda self, index, by_stage: asked.append(index) or rank(self, index, by_stage)
    )
    for schedule, chunks in (("1f1b", 1), ("interleaved", 3)):
        changes = {"parallel.pipeline": 8, "parallel.tensor": 1, "model.num_layers": 48, "data.global_batch": 256}
        config = build("native", **changes, **{"parallel.schedule": schedule, "parallel.virtual_pipeline": chunks})
        need = predict_memory(config, 32).peak_bytes
        asked.clear()
        assert fits_memory(config, 32, need)
        assert sorted(asked) == list(range(8))
        asked.clear()
        assert not fits_memory(config, 32, 0.5 * need)
        assert asked == [0]
        assert not fits_memory(config, 32, need - 1)


@pytest.mark.parametrize("as_needed", [True, False])
def test_a_long_step_of_1f1b_is_not_walked(as_needed: bool) -> None:
    pipe = Pipe("1f1b", 64, 1, 2**20)
    memory = StageMemory(120, 100, 30, 40, 0, 0, 8, 8)
    found = [most_bytes(RankWork(pipe, rank, (rank,), False, as_needed), [memory]) for rank in (0, 1)]
    buffers = 0 if as_needed else 16 * pipe.microbatches
    assert found[0] - found[1] == memory.held
    assert 64 * memory.held < found[0] - buffers < 65 * memory.held


def test_ranks_and_batches_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks=30 must be whole copies"):
        predict_memory(build(), 30)
    with pytest.raises(ConfigError, match=r"data\.global_batch=63"):
        predict_memory(build(**{"data.global_batch": 63}), 32)


def test_a_config_that_does_not_fit_is_told_what_would() -> None:
    config = build(**{"data.microbatch": 8, "model.num_layers": 64})
    need = predict_memory(config, 32)
    memory = 0.8 * need.peak_bytes / GIB
    assert not need.fits(memory)
    remedies = plan_remedies(config, 32, memory)
    for remedy in remedies:
        changed = predict_memory(with_values(config, dict(remedy.change)), 32)
        assert changed.fits(memory)
        assert changed.peak_bytes == remedy.peak_bytes
    assert remedies
    assert say_remedies(config, 32, memory) == [str(remedy) for remedy in remedies]
    assert "ranks with" in say_remedies(config, 32, 0.2 * memory)[0]
    assert say_remedies(config, 32, 0.5) == []


def test_a_thousand_layouts_are_judged_in_a_second() -> None:
    """Of one model, after each kind of part was run once; the least of several runs, for the machine's sake."""
    configs = [
        build(**{"parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.zero": zero})
        for tensor, pipeline, zero in product((1, 2, 4), (1, 2, 4), (0, 1, 2, 3))
    ]
    seconds = []
    for _ in range(4):
        start = time.process_time()
        for config in configs:
            predict_memory(config, 32)
        seconds.append(time.process_time() - start)
    assert 1000 / len(configs) * min(seconds) < 1.0


def test_megatron_golden_peaks(anchors: Path) -> None:
    """8 % on average, none more than 10 % under, and so their state; 2 % where arguments say which attention ran."""
    rows = list(golden(anchors))
    errors = [peak.error for peak, _, _ in rows]
    assert len(rows) > 250
    assert statistics.mean(map(abs, errors)) < 0.08
    assert min(errors) > -0.10
    assert statistics.mean(abs(peak.error) for peak, _, said in rows if said) < 0.02
    static = [abs(static.error) for _, static, _ in rows if static.measured == static.measured]
    assert statistics.mean(static) < 0.08


@pytest.mark.parametrize("engine", [None, "deepspeed"])
def test_bloom_peaks_and_what_ran_out_of_memory(anchors: Path, engine: str | None) -> None:
    rows = list(bloom(anchors, engine))
    errors = [row.error for row, called in rows if called is None]
    assert len(errors) > 40
    assert statistics.mean(map(abs, errors)) < 0.08
    assert [called for _, called in rows if called is not None] == [True, True]


def test_korthikanti_figures(anchors: Path) -> None:
    rows = list(korthikanti(anchors))
    assert statistics.mean(abs(row.error) for row in rows) < 0.03
    assert max(abs(row.error) for row in rows if "state" not in row.name) < 0.02
