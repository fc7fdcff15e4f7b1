"""Predicted against published peak memory: Megatron-LM's golden values, BLOOM's layout sweep, Korthikanti et al. 2022.

    python benchmarks/foresight_memory.py ANCHORS [--rows]

ANCHORS is the folder of the tables (they are others' and not in the repository). Each row becomes what `dist-llm plan
predict --rows` takes: stated, with its engine and the attention that its arguments say, and plain, without either.
Prints errors and the bound for each table. Exits with 1 where a bound is not met.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_llm.cli.rows import read_row
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


def config_of(cluster: str, overrides: Overrides) -> tuple[RunConfig, int]:
    """Return what `plan predict --rows` makes of a row on a cluster: a config, and its ranks."""
    return read_row({"cluster": cluster, **overrides})


def _number(row: Row, key: str, default: int) -> int:
    return int(row[key]) if row[key] else default


def _world(row: Row) -> int:
    """Nodes of GB200 have four devices, the others eight, and all tests but those on one node eight."""
    return 4 if row["case"].endswith("_1node") and "gb200" in row["platform"] else 8


_UNLIKE = (
    "multi-latent-attention",
    "use-megatron-fsdp",
    "fp8-format",
    "pipeline-model-parallel-layout",
    "cross-entropy-loss-fusion",
)
"""What our models and engines do not have: such rows are left out."""
_NAMES_UNLIKE = (
    "uneven_pipeline",
    "account_for_embedding",
    "distill",
    "grpo",
    "15b",
    "fsdp",
    "multi_dist_optimizer",
    "muon",
    "defer_embedding",
    "tunable",
)
"""Layers dealt out by hand, two models at once, sizes that the table does not give."""


def golden_overrides(row: Row) -> Overrides:
    """Return a row's Megatron-LM arguments in our keys."""
    tensor, pipeline = _number(row, "tensor-model-parallel-size", 1), _number(row, "pipeline-model-parallel-size", 1)
    layers, hidden, heads = (_number(row, key, 0) for key in ("num-layers", "hidden-size", "num-attention-heads"))
    gated, expert = row["swiglu"] == "True", _number(row, "num-experts", 0)
    chunk = _number(row, "num-layers-per-virtual-pipeline-stage", 0)
    chunks = layers // pipeline // chunk if chunk and pipeline > 1 else 1
    inner = _number(row, "ffn-hidden-size", hidden * 4 * 2 // 3 // 64 * 64 if gated else 4 * hidden)
    positions = {"": "learned", "learned_absolute": "learned"}.get(
        row["position-embedding-type"], row["position-embedding-type"]
    )
    overrides: Overrides = {
        "model.family": "gpt2",
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
        "parallel.data": _world(row) // (tensor * pipeline * _number(row, "context-parallel-size", 1)),
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


def says_attention(row: Row) -> bool:
    """Return whether a test's arguments say which attention ran; the same arguments have figures of both otherwise."""
    return bool(row["attention-backend"]) or row["transformer-impl"] == "local"


def golden_stated(row: Row) -> Overrides:
    """Return what the arguments say beside sizes: the engine, and the attention if they do."""
    unfused = row["transformer-impl"] == "local" or row["attention-backend"] == "unfused"
    said = {"engine.transformer_engine": "never" if unfused else "auto"} if says_attention(row) else {}
    return {"engine.name": "megatron", **said}


def golden(anchors: Path, stated: bool = True) -> Iterator[tuple[Judged, Judged, bool]]:
    """Yield peak and static bytes of the last rank of Megatron-LM's functional tests, and whether attention is said."""
    for row in read(anchors / "megatron_functional_golden_mem_time.csv"):
        kind = row["case"].partition("/")[0]
        if kind not in ("gpt", "moe") or not row["num-layers"] or not row["mem_max_alloc_bytes"]:
            continue
        if (
            _number(row, "expert-tensor-parallel-size", 0) not in (0, _number(row, "tensor-model-parallel-size", 1))
            and kind == "moe"
        ):
            continue
        if any(row[key] for key in _UNLIKE) or any(word in row["case"] for word in _NAMES_UNLIKE):
            continue
        cluster = "a100-80gb" if "a100" in row["platform"] or not row["platform"] else "h100-sxm"
        overrides = golden_overrides(row) | (golden_stated(row) if stated else {})
        last = predict_memory(*config_of(cluster, overrides)).ranks[-1].components
        name = f"{row['case']} {row['env']} {row['platform']}"
        static = float(row["mem_alloc_bytes_last"] or "nan")
        yield (
            Judged(f"golden {kind}", name, last.allocated, float(row["mem_max_alloc_bytes"])),
            Judged(f"golden {kind} static", name, last.static, static),
            says_attention(row),
        )


def bloom(anchors: Path, engine: str | None = None) -> Iterator[tuple[Judged, bool | None]]:
    """Yield the peaks of BLOOM's sweep, and whether a row that ran out of memory is called; engine None: unnamed."""
    table = "bloom plain" if engine is None else f"bloom as {engine}"
    for row in read(anchors / "bloom_prequel_layout_sweep_a100_80gb.csv"):
        measured = row["mem_max_GB"].removesuffix("GB")
        if not measured:
            continue
        named: Overrides = {} if engine is None else {"engine.name": engine}
        found = predict_memory(*config_of("a100-80gb", bloom_overrides(row) | named))
        if measured == "OOM":
            yield Judged("bloom out of memory", row["line"], found.peak_bytes, 79.1 * GIB), not found.fits(79.1)
        else:
            yield Judged(table, row["line"], found.peak_bytes, float(measured) * 1e9), None


def bloom_overrides(row: Row) -> Overrides:
    """Return a row of BLOOM's sweep in our keys."""
    count = {
        key: int(row[key]) for key in ("hidden", "layers", "heads", "seq", "vocab", "dp", "tp", "pp", "mbs", "gbs")
    }
    unit = count["mbs"] * count["dp"]
    return {
        "model.num_layers": count["layers"],
        "model.hidden_size": count["hidden"],
        "model.num_heads": count["heads"],
        "model.num_kv_heads": count["heads"],
        "model.ffn_hidden_size": 4 * count["hidden"],
        "model.vocab_size": count["vocab"],
        "model.max_seq_len": count["seq"],
        "data.seq_len": count["seq"],
        "data.microbatch": count["mbs"],
        "data.global_batch": count["gbs"] // unit * unit,
        "parallel.data": count["dp"],
        "parallel.tensor": count["tp"],
        "parallel.pipeline": count["pp"],
        "parallel.zero": int(row["zero_stage"]),
        "parallel.recompute": "full",
        "precision.name": "bf16" if row["precision"].startswith("bf16") else "fp16",
    }


KORTHIKANTI: dict[str, tuple[int, ...]] = {
    "22B": (48, 6144, 64, 8, 1, 1, 4, 4),
    "175B": (96, 12288, 96, 8, 8, 3, 1, 64),
    "530B": (105, 20480, 128, 8, 35, 3, 1, 280),
    "1T": (128, 25600, 160, 8, 64, 1, 1, 512),
}
"""Korthikanti et al. 2022, Table 3: layers, hidden size, heads, tp, pp, chunks a rank, microbatch, global batch."""


def korthikanti_config(name: str, sequence: bool, recompute: str) -> tuple[RunConfig, int]:
    """Return a configuration of the paper's Table 3, and its ranks, in plain keys."""
    layers, hidden, heads, tensor, pipeline, chunks, microbatch, batch = KORTHIKANTI[name]
    overrides: Overrides = {
        "model.num_layers": layers,
        "model.hidden_size": hidden,
        "model.num_heads": heads,
        "model.num_kv_heads": heads,
        "model.ffn_hidden_size": 4 * hidden,
        "model.vocab_size": 51200,
        "model.max_seq_len": 2048,
        "data.seq_len": 2048,
        "data.microbatch": microbatch,
        "data.global_batch": batch,
        "parallel.tensor": tensor,
        "parallel.sequence": sequence,
        "parallel.pipeline": pipeline,
        "parallel.data": 1,
        "parallel.virtual_pipeline": chunks,
        "parallel.zero": 0,
        "parallel.recompute": recompute,
        "precision.name": "bf16",
    }
    return config_of("a100-80gb", overrides)


def korthikanti(anchors: Path) -> Iterator[Judged]:
    """Yield state and activations of the first rank, Figure 1, and the shares of Figure 7."""
    ways = {"none": (False, "none"), "seqpar": (True, "none"), "selective": (False, "selective")}
    ways |= {"seq_sel": (True, "selective"), "full": (False, "full")}
    for row in read(anchors / "korthikanti2022_memory.csv"):
        name = row["model"]
        found = {way: predict_memory(*korthikanti_config(name, *how)).ranks[0].components for way, how in ways.items()}
        state = found["none"].static - found["none"].workspace
        yield Judged("korthikanti", f"{name} state", state, float(row["params_and_opt_GiB"]) * GIB)
        for way, column in (("none", "act_no_recompute_tp_only_GiB"), ("seq_sel", "act_seq_selective_GiB")):
            yield Judged("korthikanti", f"{name} {way}", found[way].activations, float(row[column]) * GIB)
        for way in ("seqpar", "selective", "seq_sel", "full"):
            share = 100 * found[way].activations / found["none"].activations
            yield Judged("korthikanti shares", f"{name} {way} %", share, float(row[f"fig7_{way}_pct"]))


@dataclass(frozen=True)
class Bound:
    """What a table's rows must keep: the mean absolute error, and the most that any is under, if that is bounded."""

    mean: float
    under: float | None = None


BOUNDS = {
    "golden peaks, stated": Bound(0.08, 0.10),
    "golden static, stated": Bound(0.08),
    "bloom plain": Bound(0.08),
    "bloom as deepspeed": Bound(0.08),
    "korthikanti": Bound(0.08),
    "korthikanti shares": Bound(0.08),
}
"""By table; others are printed and not judged."""


def golden_rows(anchors: Path) -> list[Judged]:
    """Return Megatron-LM's tests: all of them, and their peaks by kind and by whether attention is said."""
    found: list[Judged] = []
    for stated in (True, False):
        keys = "stated" if stated else "plain"
        for peak, static, said in golden(anchors, stated):
            part = f"  {peak.table}, {keys}, attention {'said' if said else 'not said'}"
            found += [replace(peak, table=f"golden peaks, {keys}"), replace(static, table=f"golden static, {keys}")]
            found += [replace(peak, table=part)] if stated else []
    return found


def rows(anchors: Path) -> list[Judged]:
    """Return every row of the three tables."""
    found = golden_rows(anchors)
    for engine in (None, "deepspeed", "megatron", "native"):
        found += [row for row, called in bloom(anchors, engine) if called is None]
    return [row for row in [*found, *korthikanti(anchors)] if row.measured == row.measured]


def _summary(table: str, judged: Sequence[Judged]) -> tuple[str, bool]:
    """Return a line about a table, and whether its bound is kept."""
    errors = sorted(row.error for row in judged)
    sizes = sorted(map(abs, errors))
    mean, bound = statistics.mean(sizes), BOUNDS.get(table)
    under = bound is None or bound.under is None or errors[0] >= -bound.under
    kept = bound is None or (mean <= bound.mean and under)
    limit = (
        ""
        if bound is None
        else f"<= {100 * bound.mean:.0f} %" + ("" if bound.under is None else f", under <= {100 * bound.under:.0f} %")
    )
    figures = (mean, statistics.mean(errors), sizes[int(0.9 * (len(sizes) - 1))], errors[0], errors[-1])
    columns = "".join(f"{100 * figure:9.1f}" for figure in figures)
    return f"{table:44s}{len(judged):5d}{columns}  {limit}{'' if kept else '  NOT KEPT'}", kept


def main() -> int:
    """Print how far predictions are from each table; return 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description="Predicted against published peak memory.")
    parser.add_argument("anchors", type=Path, help="folder of the published tables")
    parser.add_argument("--rows", action="store_true", help="print every row too")
    arguments = parser.parse_args()
    found = rows(arguments.anchors)
    print(f"{'table, errors in %':44s}{'rows':>5}{'mean':>9}{'sign':>9}{'p90':>9}{'under':>9}{'over':>9}  bound")
    good = True
    for table in dict.fromkeys(row.table for row in found):
        chosen = [row for row in found if row.table == table]
        line, kept = _summary(table, chosen)
        print(line)
        good = good and kept
        for row in sorted(chosen, key=lambda row: row.error) if arguments.rows else ():
            print(f"    {100 * row.error:+6.1f} %  {row.predicted:.4g} of {row.measured:.4g}  {row.name}")
    called = [called for _, called in bloom(arguments.anchors) if called is not None]
    print(f"bloom: {sum(called)} of {len(called)} rows that ran out of memory are called")
    return 0 if good and all(called) else 1


if __name__ == "__main__":
    sys.exit(main())
