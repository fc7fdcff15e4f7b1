"""`dist-llm plan predict`: how long a step of one configuration takes, why, and what it holds; or of a file of rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.cli.parse import Answer, Command, add_config, add_json
from dist_llm.errors import ConfigError, DistLLMError, StorageError, Violation

if TYPE_CHECKING:
    from dist_llm.config.run import RunConfig

_EPILOG = """\
Each line of a file of rows is {"overrides": {KEY: VALUE, ...}} with presets (cluster, model, precision, parallel, ...)
and settings (model.num_layers, parallel.tensor, ...) as keys. It is answered with a line of JSON in the same order:
step_seconds, seconds by component, tokens_per_second, mfu, bound_by, ranks, nodes, memory_gib and fits (whether its
peak is within its capacity); or {"error": ...}. Of a single config that does not fit, would_fit says what would.
In memory_gib, peak is what nvidia-smi shows on the pipeline rank that needs the most, allocated is what torch's
max_memory_allocated says there, and ranks has both for every pipeline rank.
A row, or a command, that gives sizes without a model preset means a model of model.family (gpt2 unless given) with
feed-forward 4 h (llama: 8/3 h), heads of 128, 51,200 tokens and positions for data.seq_len where it says nothing else.
Without data.global_batch a step fills the pipeline of every data rank once; data.seq_len is that of data=stdlib, 256.
--config FILE, such as a plan's, is taken as it is, with the overrides on it.
On a CUDA cluster precision is bf16 unless given. Ranks are parallel.data x pipeline x context x tensor; without
parallel.data those of the launcher if given, else of cluster.nodes, else one copy of the model.
Where cluster.practice is megatron (A100) and no engine is named, a row means the software that published runs had:
PyTorch's FSDP for parallel.zero=3; Megatron-DeepSpeed for 1 and 2, which alone had them with pipelines; Megatron-LM
for 0, which it is if left out, and for sequence parallelism, chunks and selective recompute, which were its alone.
There attention writes its scores to memory (engine.transformer_engine=never) unless that is given, under ZeRO 3, on
context ranks, and for sequences above 4096 tokens, where its kernels ended. Elsewhere engine=megatron has one kernel;
set engine.transformer_engine=never for Megatron-LM's `--transformer-impl local` or `--attention-backend unfused`.
Time is of products by shape, bytes moved and collectives by message, by the cluster's figures: docs/foresight.md."""

MOST_LINE = 2**20
"""Characters of the longest line of a file of rows."""


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Take overrides, or a file of rows."""
    parser.epilog = _EPILOG
    add_config(parser)
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="answer each line of FILE (JSONL) with a line of JSON"
    )
    add_json(parser)


def predict(arguments: argparse.Namespace) -> Answer:
    """Answer one configuration, or every row of a file; overrides then stand before each row's own."""
    from dist_llm.cli.rows import read_row

    common = _typed(arguments.overrides)
    if arguments.rows is not None:
        answers = [_answer_line(line, common, arguments.config_file) for line in _lines(arguments.rows)]
        return Answer("\n".join(json.dumps(answer) for answer in answers), is_json=True)
    config, ranks = read_row(common, arguments.config_file)
    data = answer_config(config, ranks)
    if not data["fits"]:
        from dist_llm.planner.fit_memory import say_remedies

        data["would_fit"] = say_remedies(config, ranks, config.cluster.memory_gib)
    return Answer(_text(data), data)


def answer_config(config: RunConfig, ranks: int) -> dict[str, object]:
    """Return what is foretold of a config on so many ranks, as plain data."""
    from dist_llm.planner.cost.step import node_devices, predict_step

    step, memory = predict_step(config, ranks), predicted_memory(config, ranks)
    data = config.data
    return {
        "step_seconds": step.seconds,
        "components": dict(step.components),
        "stages": [{"forward_seconds": forward, "backward_seconds": backward} for forward, backward in step.stages],
        "global_batch": data.global_batch,
        "seq_len": data.seq_len,
        "tokens_per_second": data.global_batch * data.seq_len / step.seconds,
        "mfu": step.mfu,
        "bound_by": step.bound_by,
        "ranks": ranks,
        "nodes": -(-ranks // node_devices(config.cluster)),
        "memory_gib": memory,
        "fits": memory["peak"] <= memory["capacity"],
    }


def predicted_memory(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return the memory of every pipeline rank by component and stage, in GiB, and what a device has."""
    from dist_llm.planner.footprint import predict_memory

    return {"capacity": config.cluster.memory_gib, **predict_memory(config, ranks).memory_gib()}


def _answer_line(line: str, common: Mapping[str, object], file: Path | None) -> dict[str, object]:
    """Return the answer to one line: what is foretold, or what is wrong with it."""
    from dist_llm.cli.rows import read_row

    try:
        return answer_config(*read_row({**common, **_overrides(line)}, file))
    except DistLLMError as error:
        return {"error": str(error)}
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        return {"error": f"cannot be reckoned: {error}"}


def _overrides(line: str) -> Mapping[str, object]:
    """Return the overrides in a line. Raises ConfigError where it holds none."""
    if len(line) > MOST_LINE:
        raise ConfigError(f"a row of more than {MOST_LINE} characters")
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not a line of JSON: {error}") from error
    found = row.get("overrides") if isinstance(row, dict) else None
    if not isinstance(found, dict):
        raise ConfigError('a row is {"overrides": {KEY: VALUE, ...}}')
    return found


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, for an answer each; what is no text in them as U+FFFD."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            yield from file
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError([Violation("--rows", str(path), "is no file")]) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _typed(overrides: list[str]) -> dict[str, object]:
    """Return overrides of the command line by key, their values as Hydra's grammar types them."""
    from dist_llm.cli.compose import parse_overrides

    return parse_overrides(overrides)


def _text(data: Mapping[str, Any]) -> str:
    """Return the answer for a person: the step, and what it is spent on, most first."""
    seconds = float(data["step_seconds"])
    where = f"{_count(data['ranks'], 'rank')} ({_count(data['nodes'], 'node')})"
    lines = [
        f"step: {seconds:.4g} s for {data['global_batch']:,} sequences of {data['seq_len']:,} tokens, "
        f"{data['tokens_per_second']:,.0f} tokens/s on {where}, MFU {100 * data['mfu']:.1f} %, "
        f"bound by {data['bound_by']}"
    ]
    parts = sorted(data["components"].items(), key=lambda item: -item[1])
    lines += [f"  {name:<18} {value:10.4g} s {100 * value / seconds:6.1f} %" for name, value in parts if value]
    memory = data["memory_gib"]
    lines.append(
        f"memory: {memory['peak']:.4g} of {memory['capacity']:.4g} GiB on pipeline rank {memory['pipeline_rank']}, "
        "the fullest" + ("" if data["fits"] else ": this does NOT FIT")
    )
    held = sorted(memory["components"].items(), key=lambda item: -item[1])
    lines += [f"  {name:<18} {size:10.4g} GiB" for name, size in held if size]
    if not data["fits"]:
        what = data["would_fit"] or ["no layout of it on these devices: a smaller model, or devices with more memory"]
        lines += ["would fit:", *(f"  {each}" for each in what)]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


PREDICT = Command(
    "how long a step takes and what it is spent on, for one config or rows", add_predict_arguments, predict
)
