"""`dist-llm plan dry-run`: build a run of any size on this machine without its ranks, and say what they would hold."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config
from dist_llm.errors import ConfigError, Violation

if TYPE_CHECKING:
    from dist_llm.cli.compose import Composed
    from dist_llm.config.run import RunConfig

_EPILOG = """\
Every stage is built as training builds it, on a process group of any size that moves nothing and on tensors without
values, and runs two microbatches. The figures are those of the rank at index 0 of all axes but the pipeline's, which
holds the most:

  param_bytes            stored parameters: this rank's shards
  gathered_param_bytes   whole parameters in the compute format beside them, at most
  grad_bytes             gradients, at most
  optimizer_bytes        AdamW's two moments
  host_bytes             what parallel.offload keeps in host memory instead, gradients' buffers too
  peak_activation_bytes  everything else, at most: what the backward needs, what is being computed, receive buffers
  traffic                collectives of a step by axis and kind, as `count` and `payload_bytes`; of several stages on
                         a rank, the first has what the rank issues once for all of them

The last line adds what a device holds beside tensors, by the figures of cluster: the workspace of matrix products,
fragmentation, and cluster.reserve_gib. In --json: device_bytes, of the fullest, capacity_bytes and fits.

Ranks are parallel.data x pipeline x context x tensor where parallel.data is set, else --ranks, else those of the
launcher. Without data.global_batch a step has data ranks x data.microbatch x parallel.pipeline sequences.
Experts are taken as evenly used, blocks as not compiled."""

_BATCH_WORDS = ("data.global_batch=", "experiment=", "data=")


def add_dry_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config and the number of ranks."""
    parser.epilog = _EPILOG
    add_config(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks, where parallel.data does not say (see below)")
    add_json(parser)


def dry_run(arguments: argparse.Namespace) -> Answer:
    """Build the config's run on a fake process group and report by stage and pipeline rank."""
    composed = compose_arguments(arguments)
    ranks = _ranks(composed, arguments.ranks)
    says_batch = any(word.lstrip("+").startswith(_BATCH_WORDS) for word in arguments.overrides)
    if not says_batch and arguments.config_file is None:
        _take_batch(composed, ranks)
    config = load_config(composed, ranks)

    from dist_llm.cli.say import say_on_stderr
    from dist_llm.train.dry_run import dry_run as build

    data = build(config, ranks, say_on_stderr)
    data |= _on_device(config, data["pipeline_ranks"])
    return Answer(_text(data), data)


def _on_device(config: RunConfig, rows: object) -> dict[str, object]:
    """Return what the fullest device holds in all, and whether the cluster's do."""
    from dist_llm.planner.device_memory import device_memory

    assert isinstance(rows, list)
    held = device_memory(config).in_use(max(row["peak_bytes"] for row in rows))
    capacity = round(config.cluster.memory_gib * 2**30)
    return {"device_bytes": held, "capacity_bytes": capacity, "fits": held <= capacity}


def _ranks(composed: Composed, asked: int | None) -> int:
    """Return the number of ranks: what the layout multiplies to, else as asked, else the launcher's."""
    from dist_llm.config.decode import decode_partly

    if asked is not None and not 1 <= asked <= 2**20:
        raise ConfigError([Violation("--ranks", asked, "must be from 1 to 1048576")])
    config = decode_partly(composed.tree).config
    parallel = config.parallel
    if asked is not None:
        return asked
    if parallel.data is not None:
        return parallel.data * parallel.model_ranks
    return config.launcher.nproc * config.launcher.nodes


def _take_batch(composed: Composed, ranks: int) -> None:
    """Set the global batch to as many sequences as fill the pipeline once."""
    from dist_llm.config.decode import decode_partly
    from dist_llm.config.rules import data_ranks

    config = decode_partly(composed.tree).config
    data = data_ranks(config, ranks)
    section = composed.tree.get("data")
    if data is not None and isinstance(section, dict):
        fill = config.parallel.pipeline * (2 if config.parallel.schedule == "dualpipev" else 1)
        section["global_batch"] = data * config.data.microbatch * fill


def _gib(number: object) -> str:
    return f"{float(str(number)) / 2**30:10.3f}"


_COLUMNS = ("param", "gathered_param", "grad", "optimizer", "peak_activation")


def _text(data: Mapping[str, object]) -> str:
    """Return the figures as a table in GiB."""
    lines = [
        f"{data['num_params']:,} parameters on {data['ranks']:,} ranks, global batch {data['global_batch']:,}, "
        f"{data['microbatches']} microbatches a rank",
        f"microbatches of {data['microbatch']} x {data['seq_len']} tokens, {data['precision']}, ZeRO {data['zero']}, "
        f"schedule {data['schedule']}, recompute {data['recompute']}",
        "GiB on a rank of each pipeline index; its peak is their sum",
        f"{'rank':>4}  {'stages':<12}"
        + "".join(f"{name.replace('_', ' '):>16}" for name in _COLUMNS)
        + f"{'peak':>11}",
    ]
    rows = data["pipeline_ranks"]
    assert isinstance(rows, list)
    for row in rows:
        stages = ",".join(str(stage) for stage in row["stages"])
        sizes = "".join(f"{_gib(row[f'{name}_bytes']):>16}" for name in _COLUMNS)
        lines.append(f"{row['pipeline_rank']:>4}  {stages:<12}{sizes}{_gib(row['peak_bytes']):>11}")
    held, capacity = (_gib(data[f"{name}_bytes"]).strip() for name in ("device", "capacity"))
    verdict = "fits" if data["fits"] else "does not fit"
    lines.append(f"with workspace, fragmentation and reserve {held} of {capacity} GiB of a device: {verdict}")
    return "\n".join(lines)


DRY_RUN = Command(
    "what every rank would hold and send, at any scale, without its ranks", add_dry_run_arguments, dry_run
)
