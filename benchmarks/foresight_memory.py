"""Predicted against published peak memory: Megatron-LM's golden values, BLOOM's layout sweep, Korthikanti et al. 2022.

    python benchmarks/foresight_memory.py ANCHORS [--rows]

ANCHORS is the folder of the tables (they are others' and not in the repository). Prints rows, mean absolute error, the
most that a row is under, the 90th percentile and the bound for each table. Exits with 1 where a bound is not met.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dist_llm.cli.compose import compose
from dist_llm.config.run import RunConfig
from dist_llm.planner.footprint import GIB, predict_memory

Row = Mapping[str, str]
Overrides = dict[str, object]


@dataclass(frozen=True)
class Judged:
    """A published row: what table it is of, how it is called, and bytes predicted and measured."""

    table: str
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error; below 0 the prediction is under."""
        return self.predicted / self.measured - 1


def read(path: Path) -> list[Row]:
    """Return the rows of a table without the lines that say where it comes from."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("# source")))


@lru_cache(maxsize=64)
def _base(cluster: str) -> dict[str, Any]:
    return compose(["model=gpt2-124m", "data=gpt2", f"cluster={cluster}"])


def config_of(cluster: str, overrides: Overrides) -> RunConfig:
    """Return the config of a GPT-2 on a cluster with these keys set."""
    tree = deepcopy(_base(cluster))
    for key, value in overrides.items():
        *sections, leaf = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return RunConfig.model_validate(tree)


def _number(row: Row, key: str, default: int) -> int:
    return int(row[key]) if row[key] else default


def _world(row: Row) -> int:
    return 8


_UNLIKE = (
    "multi-latent-attention",
    "use-megatron-fsdp",
    "fp8-format",
    "pipeline-model-parallel-layout",
    "cross-entropy-loss-fusion",
)
"""What our models and engines do not have: such rows are left out."""
_NAMES_UNLIKE = ("uneven_pipeline", "account_for_embedding", "distill", "grpo", "15b", "fsdp", "multi_dist_optimizer")
"""Layers dealt out by hand, two models at once, sizes that the table does not give."""


def golden_overrides(row: Row) -> Overrides:
    """Return a row's Megatron-LM arguments in our keys."""
    tensor, pipeline = _number(row, "tensor-model-parallel-size", 1), _number(row, "pipeline-model-parallel-size", 1)
    layers, hidden, heads = (
        _number(row, key, 0) for key in ("num-layers", "hidden-size", "num-attention-heads")
    )
    gated, expert = row["swiglu"] == "True", _number(row, "num-experts", 0)
    chunk = _number(row, "num-layers-per-virtual-pipeline-stage", 0)
    chunks = layers // pipeline // chunk if chunk and pipeline > 1 else 1
    inner = _number(row, "ffn-hidden-size", hidden * 4 * 2 // 3 // 64 * 64 if gated else 4 * hidden)
    positions = {"": "learned", "learned_absolute": "learned"}.get(
        row["position-embedding-type"], row["position-embedding-type"]
    )
    unfused = row["transformer-impl"] == "local" or row["attention-backend"] == "unfused"
    overrides: Overrides = {
        "engine.name": "megatron",
        "engine.transformer_engine": "never" if unfused else "auto",
        "model.num_layers": layers,
        "model.hidden_size": hidden,
        "model.num_heads": heads,
        "model.num_kv_heads": _number(row, "num-query-groups", heads),
        "model.head_dim": _number(row, "kv-channels", hidden // heads),
        "model.ffn_hidden_size": inner,
        "model.vocab_size": _number(row, "vocab-size", 50257),
        "model.max_seq_len": _number(row, "seq-length", 1024),
        "model.position": positions,
        "model.activation": "swiglu" if gated else "gelu",
        "model.norm": "rmsnorm" if row["normalization"] == "RMSNorm" else "layernorm",
        "model.bias": "disable_bias" not in row["case"] and not expert,
        "model.tie_embeddings": row["untie-embeddings-and-output-weights"] != "True",
        "data.seq_len": _number(row, "seq-length", 1024),
        "data.microbatch": _number(row, "micro-batch-size", 1),
        "data.global_batch": _number(row, "global-batch-size", 128),
        "parallel.tensor": tensor,
        "parallel.sequence": row["sequence-parallel"] == "True",
        "parallel.pipeline": pipeline,
        "parallel.virtual_pipeline": chunks,
        "parallel.schedule": "interleaved" if chunks > 1 else "1f1b",
        "parallel.context": _number(row, "context-parallel-size", 1),
        "parallel.zero": int(row["use-distributed-optimizer"] == "True"),
        "parallel.recompute": row["recompute-granularity"] or "none",
        "precision.name": "bf16" if row["bf16"] == "True" else "fp16",
        "run.deterministic": row["deterministic-mode"] == "True",
    }
    if expert:
        overrides |= {
            "model.moe.num_experts": expert,
            "model.moe.top_k": _number(row, "moe-router-topk", 2),
            "model.moe.ffn_hidden_size": _number(row, "moe-ffn-hidden-size", inner),
            "parallel.expert": _number(row, "expert-model-parallel-size", 1),
        }
    return overrides


def golden(anchors: Path) -> Iterator[tuple[Judged, Judged, bool]]:
    """Yield peak and static bytes of the last rank of Megatron-LM's functional tests."""
    for row in read(anchors / "megatron_functional_golden_mem_time.csv"):
        kind = row["case"].partition("/")[0]
        if kind not in ("gpt", "moe") or not row["num-layers"] or not row["mem_max_alloc_bytes"]:
            continue
        if any(row[key] for key in _UNLIKE) or any(word in row["case"] for word in _NAMES_UNLIKE):
            continue
        cluster = "a100-80gb" if "a100" in row["platform"] or not row["platform"] else "h100-sxm"
        ranks = predict_memory(config_of(cluster, golden_overrides(row)), _world(row)).ranks
        last = ranks[-1].components
        name = f"{row['case']} {row['env']} {row['platform']}"
        said = bool(row["attention-backend"]) or row["transformer-impl"] == "local"
        static = float(row["mem_alloc_bytes_last"] or "nan")
        yield (
            Judged(f"golden {kind}", name, last.allocated, float(row["mem_max_alloc_bytes"])),
            Judged(f"golden {kind} static", name, last.static, static),
            said,
        )


def bloom(anchors: Path, engine: str = "megatron") -> Iterator[tuple[Judged, bool | None]]:
    """Yield the peaks of BLOOM's sweep, and whether a row that ran out of memory is called."""
    for row in read(anchors / "bloom_prequel_layout_sweep_a100_80gb.csv"):
        text = row["mem_max_GB"].removesuffix("GB")
        if not text:
            continue
        hidden = int(row["hidden"])
        config = config_of(
            "a100-80gb",
            {
                "engine.name": engine,
                **({"engine.transformer_engine": "never"} if engine == "megatron" else {}),
                "model.num_layers": int(row["layers"]),
                "model.hidden_size": hidden,
                "model.num_heads": int(row["heads"]),
                "model.ffn_hidden_size": 4 * hidden,
                "model.vocab_size": int(row["vocab"]),
                "model.max_seq_len": int(row["seq"]),
                "data.seq_len": int(row["seq"]),
                "data.microbatch": int(row["mbs"]),
                "data.global_batch": int(row["mbs"]) * int(row["dp"]) * (int(row["gbs"]) // int(row["mbs"]) // int(row["dp"])),
                "parallel.tensor": int(row["tp"]),
                "parallel.pipeline": int(row["pp"]),
                "parallel.zero": int(row["zero_stage"]),
                "parallel.recompute": "full",
                "precision.name": "bf16" if row["precision"].startswith("bf16") else "fp16",
            },
        )
        found = predict_memory(config, int(row["gpus"]))
        if text == "OOM":
            yield Judged("bloom OOM", row["line"], found.peak_bytes, 80e9), not found.fits(79.1)
        else:
            yield Judged("bloom", f"{row['line']} {row['precision'][:4]} dp{row['dp']} tp{row['tp']} pp{row['pp']} mb{row['mbs']}", found.peak_bytes, float(text) * 1e9), None
