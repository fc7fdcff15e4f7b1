"""`dist-llm plan predict`: how long a step of one configuration takes, why, and what it holds; or of a file of rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.cli.parse import Answer, Command, add_json
from dist_llm.errors import ConfigError, DistLLMError, StorageError, Violation

if TYPE_CHECKING:
    from dist_llm.config.run import RunConfig

_EPILOG = """\
Each line of a file of rows is {"overrides": {KEY: VALUE, ...}} with presets (cluster, model, precision, parallel, ...)
and settings (model.num_layers, parallel.tensor, ...) as keys. It is answered with a line of JSON in the same order:
step_seconds, seconds by component, tokens_per_second, mfu, bound_by, ranks, nodes and memory_gib; or {"error": ...}.
A row, or a command, that gives sizes without a model preset means a model of model.family (gpt2 unless given) with
feed-forward 4 h (llama: 8/3 h), heads of 128, 51,200 tokens and positions for data.seq_len where it says nothing else.
On a CUDA cluster precision is bf16 unless given. Ranks are parallel.data x pipeline x context x tensor; without
parallel.data those of the launcher if given, else of cluster.nodes, else one copy of the model.
Time comes from products by shape, bytes moved and collectives by message, with the cluster's figures: docs/plan.md."""

MOST_LINE = 2**20
"""Characters of the longest line of a file of rows."""


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Take overrides, or a file of rows."""
    parser.epilog = _EPILOG
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a preset or a setting, as in `train`")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="answer each line of FILE (JSONL) with a line of JSON"
    )
    add_json(parser)


def predict(arguments: argparse.Namespace) -> Answer:
    """Answer one configuration, or every row of a file; overrides then stand before each row's own."""
    from dist_llm.cli.rows import read_row

    common = _typed(arguments.overrides)
    if arguments.rows is not None:
        answers = [_answer_line(line, common) for line in _lines(arguments.rows)]
        return Answer("\n".join(json.dumps(answer) for answer in answers), is_json=True)
    config, ranks = read_row(common)
    data = answer_config(config, ranks)
    return Answer(_text(data), data)


def answer_config(config: RunConfig, ranks: int) -> dict[str, object]:
    """Return what is foretold of a config on so many ranks, as plain data."""
    from dist_llm.planner.cost.step import node_devices, predict_step

    step = predict_step(config, ranks)
    tokens = config.data.global_batch * config.data.seq_len
    return {
        "step_seconds": step.seconds,
        "components": dict(step.components),
        "stages": [{"forward_seconds": forward, "backward_seconds": backward} for forward, backward in step.stages],
        "tokens_per_second": tokens / step.seconds,
        "mfu": step.mfu,
        "bound_by": step.bound_by,
        "ranks": ranks,
        "nodes": -(-ranks // node_devices(config.cluster)),
        "memory_gib": predicted_memory(config, ranks),
    }


def predicted_memory(config: RunConfig, ranks: int) -> Mapping[str, object]:
    """Return the memory of every pipeline rank by component and stage, in GiB."""
    from dist_llm.planner.footprint import predict_memory

    return predict_memory(config, ranks).memory_gib()


def _answer_line(line: str, common: Mapping[str, object]) -> dict[str, object]:
    """Return the answer to one line: what is foretold, or what is wrong with it."""
    from dist_llm.cli.rows import read_row

    try:
        return answer_config(*read_row({**common, **_overrides(line)}))
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
    """Yield the lines of a file that hold something; what is no text in them as U+FFFD."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            yield from (line for line in file if line.strip())
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
    lines = [
        f"step: {seconds:.4g} s, {data['tokens_per_second']:,.0f} tokens/s on {data['ranks']:,} ranks "
        f"({data['nodes']:,} nodes), MFU {100 * data['mfu']:.1f} %, bound by {data['bound_by']}"
    ]
    parts = sorted(data["components"].items(), key=lambda item: -item[1])
    lines += [f"  {name:<18} {value:10.4g} s {100 * value / seconds:6.1f} %" for name, value in parts if value]
    return "\n".join(lines)


PREDICT = Command(
    "how long a step takes and what it is spent on, for one config or rows", add_predict_arguments, predict
)
