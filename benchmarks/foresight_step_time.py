"""Predicted against published step times, and the layouts that predictions choose.

    python benchmarks/foresight_step_time.py ANCHORS [--json]

ANCHORS is the folder of third-party tables, which are not part of this project. Each row of a table becomes what
`dist-llm plan predict --rows` takes, twice. Stated: the sizes and settings that the table states, the engine, and the
network of its cluster where that is known to differ. Plain: without engine and network. Nothing is fitted here.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Overrides = dict[str, object]
MPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "760m": (1536, 24, 12),
    "1b": (2048, 24, 16),
    "3b": (2560, 32, 20),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "70b": (8192, 80, 64),
}
"""Hidden size, layers and heads of MPT's configs (mosaicml/llm-foundry, scripts/train/yamls)."""
FMS = {
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "34B": (8192, 48, 64, 22016),
    "70B": (8192, 80, 64, 28672),
}
"""Hidden size, layers, heads and feed-forward width of Llama 2 (Touvron et al. 2023) and Code Llama."""


BEST_RULE = 5.7
"""Regret of the best rule of two lines on the same groups, in percent (baseline_layout_choice_regret, rounded down)."""


@dataclass(frozen=True)
class Row:
    """One published step: what a user would ask, and its seconds."""

    name: str
    overrides: Overrides
    seconds: float


@dataclass(frozen=True)
class Errors:
    """Relative errors over a table, in percent; sign: their mean."""

    table: str
    rows: int
    mape: float
    p90: float
    worst: float
    sign: float
    bound: float | None = None

    def __str__(self) -> str:
        bound = (
            "" if self.bound is None else f"  bound {self.bound:4.1f} {'met' if self.mape <= self.bound else 'MISSED'}"
        )
        return (
            f"{self.table:<48} n {self.rows:4d}  MAPE {self.mape:5.1f} %  p90 {self.p90:5.1f}  worst {self.worst:+6.1f}"
            f"  sign {self.sign:+5.1f}{bound}"
        )


def table(anchors: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a table, without the lines that say where it is from."""
    with (anchors / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("# source")))


def _gpt(shape: tuple[str, str, str], split: tuple[str, str, str], batch: tuple[str, str, str]) -> Overrides:
    """Return a GPT by (layers, hidden, heads), (tp, pp, dp) and (length, global batch, microbatch)."""
    keys = (
        *("model.num_layers", "model.hidden_size", "model.num_heads"),
        *("parallel.tensor", "parallel.pipeline", "parallel.data"),
        *("data.seq_len", "data.global_batch", "data.microbatch"),
    )
    sizes = {key: int(value) for key, value in zip(keys, (*shape, *split, *batch), strict=True)}
    return {"cluster": "a100-80gb", "model.family": "gpt2", "precision": "fp16", **sizes}


def vtrain(anchors: Path) -> Iterator[Row]:
    """Yield vTrain's single-node runs: Megatron-DeepSpeed, everything recomputed (Bang et al. 2024)."""
    for index, row in enumerate(table(anchors, "vtrain_ground_truth_single")):
        (_, batch, micro, hidden, heads, layers, length, tensor, data, pipeline, milliseconds) = row.values()
        overrides = _gpt((layers, hidden, heads), (tensor, pipeline, data), (length, batch, micro))
        overrides |= {"parallel.recompute": "full", "engine": "deepspeed"}
        yield Row(f"vtrain {index}", overrides, float(milliseconds) / 1e3)


def bloom(anchors: Path) -> Iterator[Row]:
    """Yield BLOOM's sweep on JeanZay, whose nodes have 4 x 100 Gbit/s; a row that contradicts itself is left out."""
    for row in table(anchors, "bloom_prequel_layout_sweep_a100_80gb"):
        split = (row["tp"], row["pp"], row["dp"])
        if not row["sec_per_it"].replace(".", "").isdigit() or int(row["gpus"]) != _product(split):
            continue
        overrides = _gpt((row["layers"], row["hidden"], row["heads"]), split, (row["seq"], row["gbs"], row["mbs"]))
        overrides |= {"model.vocab_size": int(row["vocab"]), "parallel.recompute": "full", "parallel.zero": 1}
        overrides |= {"precision": row["precision"][:4], "cluster.network_gbit_per_second": 400.0}
        overrides["engine"] = "deepspeed"
        yield Row(f"bloom {row['line']}", overrides, float(row["sec_per_it"]))


def _product(sizes: tuple[str, ...]) -> int:
    found = 1
    for size in sizes:
        found *= int(size)
    return found


def llm_foundry(anchors: Path) -> Iterator[Row]:
    """Yield LLM Foundry's FSDP runs of MPT on A100 with 1600 Gbit/s a node."""
    for index, row in enumerate(table(anchors, "llm_foundry_mpt_mfu")):
        hidden, layers, heads = map(str, MPT[row["Model"]])
        gpus, length, batch = row["# GPUs"], row["SeqLen (T)"], row["GlobalBatchSize"]
        overrides = _gpt((layers, hidden, heads), ("1", "1", gpus), (length, batch, row["MicroBatchSize"]))
        overrides |= {"cluster": row["GPU"].replace("_", "-"), "cluster.network_gbit_per_second": 1600.0}
        overrides |= {"precision": "bf16", "parallel.zero": 3, "model.vocab_size": 50368}
        overrides["parallel.recompute"] = "full" if row["Activation Checkpointing"] == "True" else "none"
        seconds = int(batch) * int(length) / (float(row["Throughput (T/s/GPU)"]) * int(gpus))
        yield Row(f"llm-foundry {index}", overrides, seconds)


def narayanan(anchors: Path) -> Iterator[Row]:
    """Yield Narayanan et al. 2021, table 1, on Selene: 1600 Gbit/s a node."""
    for row in table(anchors, "narayanan2021_table1"):
        split = (row["tp"], row["pp"], row["dp"])
        batch = (row["seq"], row["global_batch"], row["micro_batch_secondary"])
        overrides = _gpt((row["layers"], row["hidden"], row["heads"]), split, batch)
        overrides |= {"parallel.recompute": "full", "cluster.network_gbit_per_second": 1600.0}
        yield Row(f"narayanan {row['params_B']}B", overrides, float(row["iter_s_implied"]))


def narayanan_2(anchors: Path) -> Iterator[Row]:
    """Yield the 3-D rows of Narayanan et al. 2021, table 2 (8 tensor ranks, the rest pipeline), from its rounded rates.

    Its ZeRO-3 rows are left out: that version of DeepSpeed hid nothing that it gathered.
    """
    shapes = {"174.6": ("96", "12288", "96"), "529.6": ("105", "20480", "128")}
    for row in table(anchors, "narayanan2021_table2_zero3_vs_ptd"):
        if row["scheme"] != "PTD":
            continue
        layers, hidden, heads = shapes[row["params_B"]]
        pipeline, data = int(row["model_parallel"]) // 8, int(row["gpus"]) // int(row["model_parallel"])
        batch = ("2048", row["global_batch"], row["micro_batch"])
        overrides = _gpt((layers, hidden, heads), ("8", str(pipeline), str(data)), batch)
        overrides |= {"parallel.recompute": "full", "cluster.network_gbit_per_second": 1600.0}
        flops = _megatron_flops(int(layers), int(hidden), 2048, int(row["global_batch"]))
        seconds = flops / (float(row["tflops_per_gpu"]) * 1e12 * int(row["gpus"]))
        yield Row(f"narayanan table 2 {row['params_B']}B {row['gpus']}", overrides, seconds)


def _megatron_flops(layers: int, hidden: int, length: int, batch: int) -> float:
    """Return the FLOPs of a step as the paper counts them, recompute included (its equation 3)."""
    shares = 1 + length / (6 * hidden) + 51200 / (16 * layers * hidden)
    return 96 * batch * length * layers * hidden**2 * shares


def korthikanti(anchors: Path) -> Iterator[Row]:
    """Yield Korthikanti et al. 2022, tables 3 and 5: full recompute, and sequence parallel with selective recompute."""
    for row in table(anchors, "korthikanti2022_table3_table5"):
        split = (row["tp"], row["pp"], row["dp"])
        batch = ("2048", row["global_batch"], row["micro_batch"])
        overrides = _gpt((row["layers"], row["hidden"], row["heads"]), split, batch)
        overrides |= {"cluster.network_gbit_per_second": 1600.0, "parallel.virtual_pipeline": int(row["interleave_v"])}
        for column, recompute, sequence in (
            ("iter_s_full_recompute", "full", False),
            ("iter_s_present", "selective", True),
        ):
            if row[column]:
                ways = {"parallel.recompute": recompute, "parallel.sequence": sequence}
                yield Row(f"korthikanti {row['model']} {recompute}", overrides | ways, float(row[column]))


def fms_fsdp(anchors: Path) -> Iterator[Row]:
    """Yield IBM's FSDP runs of Llama on 128 A100 and 96 H100, without recompute (7B) or with some (reported apart)."""
    for row in table(anchors, "fms_fsdp_llama"):
        hidden, layers, heads, inner = FMS[row["model"]]
        for cluster, gpus, column in (("a100-80gb", 128, "a100_tok_s_gpu"), ("h100-sxm", 96, "h100_tok_s_gpu")):
            if row["model"] != "7B":
                continue
            batch = int(row["batch"])
            overrides = _gpt(
                (str(layers), str(hidden), str(heads)), ("1", "1", str(gpus)), ("4096", str(batch * gpus), str(batch))
            )
            overrides |= {
                "cluster": cluster,
                "model.family": "llama",
                "model.ffn_hidden_size": inner,
                "precision": "bf16",
            }
            overrides |= {"parallel.zero": 3, "parallel.replicate": gpus // 8, "model.vocab_size": 32000}
            yield Row(f"fms {row['model']} {cluster}", overrides, batch * 4096 / float(row[column]))


TABLES: dict[str, tuple[Callable[[Path], Iterator[Row]], float | None]] = {
    "vTrain, 2-8 A100": (vtrain, 12.0),
    "BLOOM sweep, 80-384 A100": (bloom, 9.0),
    "LLM Foundry, 8-128 A100": (llm_foundry, 12.0),
    "Narayanan 2021 table 1, 32-3072 A100": (narayanan, 7.0),
    "Narayanan 2021 table 2, 384-2240 A100": (narayanan_2, 7.0),
    "Korthikanti 2022 tables 3 and 5": (korthikanti, 7.0),
    "fms-fsdp Llama 7B, 128 A100 and 96 H100": (fms_fsdp, None),
}
"""Tables, and the error that each is held to, in percent."""


_STATED = ("engine", "cluster.network_gbit_per_second")
"""What a row of a table may leave unsaid."""


def plain(row: Row) -> Row:
    """Return a row without what tables say of engines and networks in other places."""
    return replace(row, overrides={key: value for key, value in row.overrides.items() if key not in _STATED})


def foretell(row: Row) -> float:
    """Return the predicted seconds of a row."""
    from dist_llm.cli.rows import read_row
    from dist_llm.planner.cost.step import predict_step

    return predict_step(*read_row(row.overrides)).seconds


def errors_of(name: str, pairs: list[tuple[float, float]], bound: float | None) -> Errors:
    """Return the errors of (predicted, measured) seconds."""
    relative = sorted((100 * (predicted / measured - 1) for predicted, measured in pairs), key=abs)
    absolute = [abs(each) for each in relative]
    p90 = absolute[min(len(absolute) - 1, int(0.9 * len(absolute)))]
    mean = sum(absolute) / len(absolute)
    return Errors(name, len(pairs), mean, p90, relative[-1], sum(relative) / len(relative), bound)


def rows(anchors: Path) -> list[Errors]:
    """Return the errors of every table in the folder of anchors, stated and plain."""
    found = []
    for name, (read, bound) in TABLES.items():
        for keys, asked in (("stated", list(read(anchors))), ("plain", [plain(row) for row in read(anchors)])):
            pairs = [(foretell(row), row.seconds) for row in asked]
            found.append(errors_of(f"{name}, {keys}", pairs, bound))
    return found


def regrets(anchors: Path) -> list[float]:
    """Return, for each model, number of GPUs and batch of vTrain, how much slower the layout is that is foretold best.

    Layouts are tensor, pipeline and data ranks with a microbatch; regret is over the fastest measured, in percent.
    """
    groups: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for row in vtrain(anchors):
        own = row.overrides
        shape = tuple(own[f"model.{key}"] for key in ("hidden_size", "num_layers", "num_heads"))
        gpus = int(str(own["parallel.tensor"])) * int(str(own["parallel.pipeline"])) * int(str(own["parallel.data"]))
        groups[shape, gpus, own["data.global_batch"]].append((foretell(row), row.seconds))
    many = [group for group in groups.values() if len(group) > 1]
    return [100 * (min(group)[1] / min(seconds for _, seconds in group) - 1) for group in many]


def main() -> None:
    """Print the figures as text or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("anchors", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found, regret = rows(arguments.anchors), regrets(arguments.anchors)
    mean = sum(regret) / len(regret)
    if arguments.json:
        print(json.dumps({"tables": [vars(each) for each in found], "regret": {"groups": len(regret), "mean": mean}}))
        return
    for each in found:
        print(each)
    print(
        f"layout choice, vTrain 2-8 A100: {len(regret)} groups, mean regret {mean:.1f} %, most {max(regret):.1f} %  "
        f"the best rule of two lines {BEST_RULE} % {'met' if mean < BEST_RULE else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
