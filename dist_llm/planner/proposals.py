"""Layouts worth weighing: for each split of the ranks the microbatch, ZeRO stage, recompute and schedule in use.

    tp <= devices a node;  pp x chunks <= layers;  cp from 8192 tokens;  ep where there are experts;  dp is what is left

`plan layouts` lists all that is legal; of those that differ in nothing a cost model sees, one is proposed here. Whether
a proposal is legal is asked of the rules (config/checks.py). What the user fixes is so in every proposal (pins.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_llm.config.checks import OF_THIS_MACHINE, RULES
from dist_llm.config.model import ModelConfig
from dist_llm.config.rules import divisors
from dist_llm.config.run import RunConfig
from dist_llm.planner.layouts import pipeline_schedules
from dist_llm.planner.pins import FREE, Pins

MICROBATCHES = (1, 2, 4, 8, 16)
RECOMPUTED_SHARES = (1 / 4, 1 / 2, 3 / 4)
"""Blocks of a stage that are recomputed whole, between some operators of all blocks and all of all."""
MOST_CHUNKS, MOST_PIPELINE = 6, 64
LONG_SEQUENCE = 8192
"""Tokens from which splitting a sequence over ranks is weighed."""

Choice = dict[str, Any]

_ASKED = tuple(rule for rule in RULES if rule.name not in OF_THIS_MACHINE)


def propose_layouts(
    config: RunConfig, ranks: int, devices_per_node: int, pins: Pins = FREE
) -> Iterator[tuple[RunConfig, ...]]:
    """Yield legal configs that differ from `config` in layout and microbatch, each with ever more recomputed.

    The first of them that fits is the fastest: recompute costs time and saves memory.
    """
    for split in _splits(config, ranks, devices_per_node, pins):
        for microbatch in pins.among("microbatch", MICROBATCHES):
            if config.data.global_batch % (split["data"] * microbatch):
                break
            data = config.data.model_copy(update={"microbatch": microbatch})
            for inner in _inner(config, split, microbatch, pins):
                plain = config.parallel.model_copy(update={**split, **inner})
                agains = [again for again in _recomputes(config, plain.num_stages) if pins.allow(again)]
                layouts = [plain.model_copy(update=again) for again in agains]
                proposed = [config.model_copy(update={"parallel": layout, "data": data}) for layout in layouts]
                legal = tuple(each for each in proposed if not any(rule(each, ranks) for rule in _ASKED))
                if legal:
                    yield legal


def _recomputes(config: RunConfig, stages: int) -> list[Choice]:
    """Return what may be recomputed, ever more of it: of our engine cheap operators first, then block by block."""
    if config.engine.name != "native":
        return [{"recompute": name} for name in ("none", "selective", "full")]
    layers = config.model.num_layers // stages
    some = sorted({round(share * layers) for share in RECOMPUTED_SHARES} - {0, layers})
    return [
        {"recompute": "none"},
        {"recompute": "selective", "recompute_operators": ("norm", "activation")},
        *({"recompute": "full", "recompute_layers": count} for count in some),
        {"recompute": "full"},
    ]


def _splits(config: RunConfig, ranks: int, devices_per_node: int, pins: Pins) -> Iterator[Choice]:
    """Yield how the ranks may be split: tensor and context inside a node, pipeline and data over the rest."""
    model = config.model
    for tensor in pins.among("tensor", (n for n in divisors(ranks) if n <= devices_per_node)):
        if tensor == 1 and pins.values.get("sequence"):
            continue  # it would split nothing
        if ranks % tensor or model.num_heads % tensor or model.kv_heads % tensor:
            continue
        for context in _contexts(config.data.seq_len, ranks // tensor, pins):
            for pipeline in divisors(ranks // tensor // context):
                data = ranks // tensor // context // pipeline
                deepest = min(model.num_layers, max(MOST_PIPELINE, pins.values.get("pipeline", 1)))
                if pipeline <= deepest and data <= config.data.global_batch:
                    even = tensor > 1 and config.data.seq_len % (tensor * context) == 0
                    split = {"tensor": tensor, "context": context, "pipeline": pipeline, "data": data}
                    split["sequence"] = pins.values.get("sequence", even)
                    for expert in _experts(model, data * context):
                        if pins.allow(split | {"expert": expert}):
                            yield split | {"expert": expert}


def _contexts(seq_len: int, ranks: int, pins: Pins) -> tuple[int, ...]:
    usual = (1, *(n for n in divisors(ranks)[1:] if n <= 16 and seq_len // n >= LONG_SEQUENCE // 2))
    return tuple(n for n in pins.among("context", usual) if ranks % n == 0)


def _experts(model: ModelConfig, shards: int) -> tuple[int, ...]:
    experts = model.moe.num_experts
    return tuple(n for n in divisors(experts) if shards % n == 0) if experts else (1,)


def _inner(config: RunConfig, split: Choice, microbatch: int, pins: Pins) -> Iterator[Choice]:
    """Yield schedule and ZeRO stage for a split."""
    stages = (1, 3) if split["data"] * split["context"] > 1 else (0,)
    usual = stages if split["pipeline"] == 1 else stages[:1]
    for schedule in _pinned_schedules(config, split, microbatch, pins):
        for zero in pins.among("zero", usual):
            yield {**schedule, "zero": zero}


def _pinned_schedules(config: RunConfig, split: Choice, microbatch: int, pins: Pins) -> Iterator[Choice]:
    """Yield the schedules that pins leave, where they name none the usual ones; without a pipeline none has effect."""
    schedule, chunks = pins.values.get("schedule"), pins.values.get("virtual_pipeline")
    if schedule is None and chunks is None:
        yield from _schedules(config, split, microbatch)
    elif split["pipeline"] == 1:
        if chunks in (None, 1) and (schedule in (None, "1f1b") or pins.values.get("pipeline") == 1):
            yield {"schedule": schedule or "1f1b", "virtual_pipeline": 1}
    elif schedule is None:
        yield {"schedule": "1f1b" if chunks == 1 else "interleaved", "virtual_pipeline": chunks}
    elif chunks is not None:
        yield {"schedule": schedule, "virtual_pipeline": chunks}
    else:
        for each in pipeline_schedules(config.model.num_layers, split["pipeline"]):
            if each["schedule"] == schedule and int(str(each["virtual_pipeline"])) <= MOST_CHUNKS:
                yield each


def _schedules(config: RunConfig, split: Choice, microbatch: int) -> Iterator[Choice]:
    yield {"schedule": "1f1b", "virtual_pipeline": 1}
    pipeline = split["pipeline"]
    count = config.data.global_batch // (split["data"] * microbatch)
    layers = config.model.num_layers // pipeline
    if pipeline > 1 and count % pipeline == 0 and count // pipeline < 16:
        for chunks in divisors(layers)[1:]:
            if chunks <= MOST_CHUNKS:
                yield {"schedule": "interleaved", "virtual_pipeline": chunks}
