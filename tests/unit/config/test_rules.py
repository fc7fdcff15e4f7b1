"""The rules: each can be broken and names what would be right; what they call legal is legal; torch agrees."""

from __future__ import annotations

import random
import re
import statistics
from dataclasses import replace
from typing import Any

import pytest

from dist_llm.config.checks import RULES, check, decode_and_check, resolve_data
from dist_llm.config.extensions import Extension, find_extension
from dist_llm.config.legal import fitting_layouts
from dist_llm.config.parallel import V_SCHEDULES
from dist_llm.config.rule import RANKS, Rule, with_value
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, ExitCode, LayoutError, Violation
from tests.unit.config.broken import BROKEN as BROKEN_SECTIONS
from tests.unit.config.broken_engines import BROKEN_ENGINES
from tests.unit.config.trees import config_with, set_key, small_tree
from tests.work import counted

BROKEN = [*BROKEN_SECTIONS, *BROKEN_ENGINES]


def _install(monkeypatch: pytest.MonkeyPatch, every: bool) -> None:
    """Take every optional package to be installed and genuine, or none, whatever is here."""

    def found(name: str) -> Extension:
        return replace(find_extension(name), place="here" if every else None, problem=None)

    for module in ("checks", "engine_rules"):
        monkeypatch.setattr(f"dist_llm.config.{module}.find_extension", found)


def _id(case: tuple[str, dict[str, object], int | None, str]) -> str:
    return f"{case[0]}-{'-'.join(str(value) for value in case[1].values())}"


@pytest.mark.parametrize(("name", "changes", "ranks", "message"), BROKEN, ids=[_id(case) for case in BROKEN])
def test_rule_can_be_broken(
    name: str, changes: dict[str, object], ranks: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, every=not name.endswith("_is_installed"))
    config = config_with(**changes)
    rule = next(rule for rule in RULES if rule.name == name)
    assert rule(config, ranks)
    assert message in [str(violation) for violation in check(config, ranks)]


def test_every_rule_is_broken_by_a_test() -> None:
    assert {case[0] for case in BROKEN} == {rule.name for rule in RULES}
    assert all(rule.statement and rule.keys for rule in RULES)


@pytest.mark.parametrize("ranks", [None, 1, 2, 4, 8])
def test_small_config_is_legal(ranks: int | None) -> None:
    assert check(config_with(), ranks) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__schedule": "zero_bubble"},
        {"parallel__sequence": True, "data__seq_len": 63},
        {"model__num_kv_heads": None, "model__position": "learned"},
        {"model__head_dim": 24, "model__num_heads": 12, "model__ffn_hidden_size": 96},
        {"run__steps": 0},
        {"schedule__name": "wsd", "schedule__decay_steps": 90},
        {"precision__name": "fp64"},
        {"telemetry__eval_interval": 5, "data__validation_fraction": 0.1},
        {"parallel__pipeline": 4, "parallel__schedule": "gpipe", "data__global_batch": 2},
        {"model__mup__base_width": 32, "model__mup__output_multiplier": 2.0},
        {"model__mup__base_width": 24, "model__mup__base_head_width": 3},
        {"model__head_dim": 24, "model__mup__base_width": 32},
    ],
)
def test_legal_corners(changes: dict[str, object]) -> None:
    assert check(config_with(**changes), None) == []


class _Recorder:
    """Stands for a section and notes which keys are read from it."""

    def __init__(self, held: Any, path: str, seen: set[str]) -> None:
        self._held, self._path, self._seen = held, path, seen

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._held, name)
        path = f"{self._path}{name}"
        if name in getattr(type(self._held), "model_fields", {}):
            if hasattr(type(value), "model_fields"):
                return _Recorder(value, f"{path}.", self._seen)
            self._seen.add(path)
            return value
        # A property reads fields of its own section through the recorder.
        return getattr(type(self._held), name).fget(self)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_reads_only_what_it_names(rule: Rule) -> None:
    cases = [({}, None), ({}, 8), *((changes, ranks) for name, changes, ranks, _ in BROKEN)]
    for changes, ranks in cases:
        seen: set[str] = set()
        config: Any = _Recorder(config_with(**changes), "", seen)
        rule(config, ranks)
        assert seen <= set(rule.keys), f"{rule.name} reads {seen - set(rule.keys)}"


def _random_config(pick: random.Random) -> tuple[dict[str, Any], int | None]:
    tree = small_tree()
    small, odd = [1, 2, 3, 4, 6, 8], [1, 5, 7, 12, 100, 2**31 - 1]
    for key in (
        "parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.data parallel.replicate model.num_heads "
        "model.num_kv_heads model.num_layers data.global_batch data.microbatch model.head_dim"
    ).split():
        if pick.random() < 0.12:
            set_key(tree, key, pick.choice(small + odd))
    for key, choices in {
        "parallel.schedule": ["gpipe", "1f1b", "interleaved", "zbv"],
        "parallel.sequence": [True, False],
        "parallel.zero": [0, 1, 2, 3, 4],
        "model.position": ["learned", "rope", "none"],
        "model.ffn_hidden_size": [128, 96, 7],
        "model.hidden_size": [64, 63, 2**31 - 1],
        "data.seq_len": [64, 63, 1, 128],
        "run.steps": [0, 1, 100, "1"],
        "optimizer.lr": [1e-3, 0, float("nan")],
        "schedule.warmup_steps": [0, 10, 1000],
        "run.stepz": [1],
    }.items():
        if pick.random() < 0.04:
            set_key(tree, key, pick.choice(choices))
    return tree, pick.choice([None, 1, 2, 3, 4, 8, 12])


def test_any_config_is_ok_or_refused_at_once() -> None:
    pick = random.Random(7)
    lines, outcomes = [], {"ok": 0, "refused": 0}
    for _ in range(1000):
        tree, ranks = _random_config(pick)
        try:
            with counted() as work:
                decode_and_check(tree, ranks)
            outcomes["ok"] += 1
        except ConfigError as error:
            outcomes["refused"] += 1
            assert error.exit_code == ExitCode.CONFIG
            assert all(len(str(violation)) < 400 for violation in error.violations)
        lines.append(work.lines)
    assert min(outcomes.values()) > 200
    assert statistics.median(lines) < 10_000
    assert max(lines) < 500_000


def test_what_is_called_legal_is_legal() -> None:
    pick = random.Random(11)
    tried = 0
    for _ in range(300):
        tree, ranks = _random_config(pick)
        try:
            config = decode_and_check(tree, None)
        except ConfigError:
            continue
        for violation in check(config, ranks):
            for value in violation.legal:
                tried += 1
                changed, count = with_value(config, ranks, violation.key, value)
                assert violation.rule not in [other.rule for other in check(changed, count)]
                before = {other.key for other in check(config, ranks)}
                assert {other.key for other in check(changed, count)} <= before
    assert tried > 50


def test_unusable_keys_silence_only_their_rules() -> None:
    tree = small_tree()
    set_key(tree, "parallel.tensor", "x")
    set_key(tree, "data.global_batch", 7)
    set_key(tree, "model.num_kv_heads", 3)
    with pytest.raises(ConfigError) as caught:
        decode_and_check(tree, 4)
    assert [violation.key for violation in caught.value.violations] == ["parallel.tensor", "model.num_kv_heads"]


def test_earlier_violations_come_first() -> None:
    earlier = [Violation("model", "lama", "is not one of the presets")]
    tree = small_tree()
    set_key(tree, "parallel.tensor", 3)
    set_key(tree, "parallel.recompute_layers", 1)
    with pytest.raises(ConfigError) as caught:
        decode_and_check(tree, None, earlier, frozenset({"model"}))
    assert [violation.key for violation in caught.value.violations] == ["model", "parallel.recompute_layers"]


def test_wrong_number_of_ranks_is_a_layout_error() -> None:
    config = config_with(parallel__tensor=2, parallel__pipeline=2)
    assert resolve_data(config, 8) == 2
    with pytest.raises(LayoutError, match=r"ranks=3 must be a multiple of 4 .* use 4, 8 or 16") as caught:
        resolve_data(config, 3)
    assert caught.value.__notes__ == ["layouts that fit 3 ranks: parallel.tensor=1 parallel.pipeline=3 parallel.data=1"]
    with pytest.raises(LayoutError):
        decode_and_check({**small_tree(), "parallel": {"tensor": 2}}, 3)


def test_absurd_numbers_cost_nothing() -> None:
    config = config_with(parallel__tensor=2**31 - 1, data__global_batch=2**31 - 1, model__num_heads=2**31 - 1)
    with counted() as work:
        for ranks in (720720, 2**20, 999_999_999):
            assert check(config, ranks)
            fitting_layouts(config, ranks, RULES)
            with pytest.raises(LayoutError):
                resolve_data(config_with(parallel__tensor=2, parallel__data=2), ranks)
    assert work.lines < 5_000_000


def test_fitting_layouts_are_legal() -> None:
    config = config_with(parallel__tensor=3, parallel__pipeline=2)
    layouts = fitting_layouts(config, 8, RULES, most=99)
    assert len(layouts) > 5
    for layout in layouts:
        sizes = {key: int(size) for key, size in re.findall(r"parallel\.(\w+)=(\d+)", layout)}
        changed = config_with(**{f"parallel__{key}": size for key, size in sizes.items()})
        assert check(changed, 8) == []


def _torch_builds(schedule: str, pipeline: int, chunks: int, microbatches: int) -> bool:
    """Whether torch builds this schedule, judged by a stage that computes nothing."""
    from torch.distributed.pipelining import schedules
    from torch.distributed.pipelining.stage import _PipelineStageBase

    class Stage(_PipelineStageBase):  # type: ignore[misc]
        def __init__(self, index: int) -> None:
            self.stage_index, self.num_stages = index, pipeline * chunks
            self.group_rank, self.group_size, self.has_backward = 0, pipeline, True
            self.submod = None

        def _create_grad_recv_info(self, *_: Any) -> Any: ...
        def _prepare_backward_infra(self, *_: Any) -> Any: ...
        def _prepare_forward_infra(self, *_: Any) -> Any: ...

    stages = [
        Stage(index)
        for index in ((0, 2 * pipeline - 1) if schedule in V_SCHEDULES else range(0, pipeline * chunks, pipeline))
    ]
    options: dict[str, Any] = {"loss_fn": lambda output, target: output, "scale_grads": False}
    try:
        single = {"gpipe": schedules.ScheduleGPipe, "1f1b": schedules.Schedule1F1B}
        multiple = {
            "interleaved": schedules.ScheduleInterleaved1F1B,
            "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
            "zbv": schedules.ScheduleZBVZeroBubble,
            "dualpipev": schedules.ScheduleDualPipeV,
        }
        if schedule in single:
            single[schedule](stages[0], microbatches, **options)
        else:
            multiple[schedule](stages, microbatches, **options)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"])
def test_torch_builds_just_what_the_rules_allow(schedule: str) -> None:
    chunks = 1 if schedule in ("gpipe", "1f1b") else 2
    verdicts = set()
    for pipeline in (2, 3, 4, 5):
        for microbatches in range(1, 18):
            config = _pipeline_config(schedule, pipeline, chunks, microbatches)
            legal = check(config, pipeline) == []
            assert legal == _torch_builds(schedule, pipeline, chunks, microbatches), (pipeline, microbatches)
            verdicts.add(legal)
    assert verdicts == ({True} if schedule in ("gpipe", "zbv") else {True, False})


def _pipeline_config(schedule: str, pipeline: int, chunks: int, microbatches: int) -> RunConfig:
    return config_with(
        parallel__pipeline=pipeline,
        parallel__virtual_pipeline=chunks,
        parallel__schedule=schedule,
        model__num_layers=10,
        data__microbatch=1,
        data__global_batch=microbatches,
    )


def test_ranks_key_is_no_setting() -> None:
    tree = small_tree()
    set_key(tree, RANKS, 4)
    with pytest.raises(ConfigError, match="ranks=4 is not a setting"):
        decode_and_check(tree, 1)
