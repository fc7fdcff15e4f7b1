"""The layouts whose collectives are written down, what a step of each issues by formula, and what it really issues.

golden.json has for each layout the number and the bytes of every collective that one training step issues, by axis and
kind, over all ranks together: what a single rank sends to experts depends on the tokens, their sum does not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from dist_llm.accounting.memory import Place, place_of
from dist_llm.accounting.traffic import Shapes, step_traffic
from dist_llm.config.run import RunConfig
from tests.parallel.ledger import Ledger
from tests.parallel.tiny import GPT2, MOE, SIGMOID_MOE, build, random_batch, tiny_config

GOLDEN = Path(__file__).parent / "golden.json"

Totals = dict[str, list[int]]
"""`axis kind` to [number, bytes]."""

V = {"pipeline": 2, "schedule": "zbv"}
CAPACITY: dict[str, object] = {"moe": {"num_experts": 4, "capacity_factor": 1.0}}
CHUNKS = {"pipeline": 2, "virtual_pipeline": 2}

LAYOUTS: tuple[tuple[int, dict[str, object], dict[str, object]], ...] = (
    (2, {"data": 2, "zero": 0}, {}),
    (2, {"data": 2, "zero": 1}, {}),
    (2, {"data": 2, "zero": 2}, {}),
    (2, {"data": 2, "zero": 3}, {}),
    (4, {"data": 4, "replicate": 2, "zero": 2}, {}),
    (2, {"tensor": 2}, GPT2),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}, {}),
    (2, {"context": 2, "zero": 0}, {}),
    (2, {"context": 2, "context_method": "ulysses", "zero": 1, "recompute": "full"}, {}),
    (2, {"pipeline": 2, "schedule": "gpipe"}, {"tie_embeddings": False}),
    (2, {"pipeline": 2, "schedule": "1f1b"}, {}),
    (2, {**CHUNKS, "schedule": "interleaved"}, {}),
    (2, {**CHUNKS, "schedule": "zero_bubble"}, GPT2),
    (4, {"pipeline": 2, "schedule": "zero_bubble", "data": 2, "zero": 3}, {}),
    (4, {**V, "data": 2, "zero": 2}, {}),
    (4, {"pipeline": 2, "schedule": "dualpipev", "data": 2, "zero": 1}, {}),
    (2, {"expert": 2, "data": 2, "zero": 0}, MOE),
    (4, {"expert": 2, "data": 4, "replicate": 2, "zero": 2}, MOE),
    (4, {"expert": 4, "context": 2, "data": 2, "zero": 3}, SIGMOID_MOE),
    (2, {"tensor": 2}, CAPACITY),
    (8, {"tensor": 2, "sequence": True, "pipeline": 2, "data": 2, "zero": 1}, {}),
    (8, {"tensor": 2, "context": 2, "pipeline": 2, "zero": 3, "recompute": "full"}, GPT2),
    (8, {"expert": 2, "tensor": 2, "sequence": True, "pipeline": 2, "data": 2, "zero": 3}, MOE),
    (8, {**V, "expert": 4, "context": 2, "data": 2, "zero": 2}, MOE),
)
"""(ranks, parallel, model)."""

BY_HAND: Mapping[str, Totals] = {
    # 4 layers and what is left at the root: 5 units; of 2 ranks each, once a step.
    "data=2 zero=1": {"shard all_gather": [10, 0], "shard reduce_scatter": [10, 0]},
    # 4 microbatches on each of 2 ranks: a layer gathers for 2 regions going forth, 2 going back and 2 recomputed;
    # the head does once going forth, the embedding once going back.
    "tensor=2 sequence=True recompute=full": {"tp all_gather": [2 * 4 * (6 * 4 + 2), 0]},
}
"""Numbers (not bytes) that a person can count, apart from the formulas."""


def name_of(parallel: Mapping[str, object], model: Mapping[str, object]) -> str:
    """Return a layout's name in golden.json."""
    kinds = [(GPT2, "gpt2"), (MOE, "experts"), (SIGMOID_MOE, "experts-sigmoid"), (CAPACITY, "experts-capacity")]
    kinds += [({"tie_embeddings": False}, "untied")]
    words = [f"{key}={value}" for key, value in parallel.items()]
    return " ".join([*words, *(word for kind, word in kinds if model == kind)])


def config_of(parallel: dict[str, object], model: dict[str, object]) -> RunConfig:
    """Return the tiny run of a layout, 4 microbatches a data rank."""
    data = int(str(parallel.get("data", 1)))
    return tiny_config(parallel, model, {"global_batch": 8, "microbatch": max(1, 2 // data)})


def by_formula(config: RunConfig, ranks: int) -> Totals:
    """Return what accounting/traffic.py says of all ranks together."""
    data = ranks // config.parallel.model_ranks
    counts: Counter[tuple[str, str]] = Counter()
    payload: Counter[tuple[str, str]] = Counter()
    for place in _places(config, data):
        traffic = step_traffic(Shapes(config.model, config.parallel, config.precision, config.data, place, data))
        counts.update(traffic.counts)
        payload.update(traffic.payload_bytes)
    return _totals(counts, payload)


def _places(config: RunConfig, data: int) -> Iterable[Place]:
    for pipeline in range(config.parallel.pipeline):
        for replica in range(data * config.parallel.context):
            for _ in range(config.parallel.tensor):
                yield place_of(config.parallel, data, pipeline, replica)


def _totals(counts: Mapping[tuple[str, str], int], payload: Mapping[tuple[str, str], int]) -> Totals:
    return {f"{axis} {kind}": [counts[axis, kind], payload[axis, kind]] for axis, kind in sorted(counts)}


def measured(config: RunConfig) -> tuple[Totals, dict[str, str]]:
    """Run two steps on this rank; return what the second issues, and the name of each axis's process group there."""
    engine = build(config)
    engine.train_step(random_batch(config, engine.data_slice, 0))
    with Ledger(engine._mesh) as ledger:
        engine.train_step(random_batch(config, engine.data_slice, 1))
    return _totals(ledger.counts, ledger.bytes), ledger.canonical


def merged(totals: Totals, canonical: Mapping[str, str]) -> Totals:
    """Add up the axes that are one process group."""
    out: Totals = {}
    for key, (count, size) in totals.items():
        axis, _, kind = key.partition(" ")
        into = out.setdefault(f"{canonical[axis]} {kind}", [0, 0])
        into[0], into[1] = into[0] + count, into[1] + size
    return out


def added(parts: Iterable[Totals]) -> Totals:
    """Add up what ranks issued."""
    out: Totals = {}
    for part in parts:
        for key, (count, size) in part.items():
            into = out.setdefault(key, [0, 0])
            into[0], into[1] = into[0] + count, into[1] + size
    return out


def read_golden() -> dict[str, Totals]:
    """Return what is written down."""
    stored: dict[str, Totals] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return stored


def write_golden(golden: Mapping[str, Totals]) -> None:
    """Write it down, a collective a line."""
    blocks = []
    for name, totals in golden.items():
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in totals.items())
        blocks.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
    GOLDEN.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def num_ranks(parallel: Mapping[str, object]) -> int:
    """Return the ranks of a layout."""
    return math.prod(int(str(parallel.get(key, 1))) for key in ("tensor", "pipeline", "context", "data"))
