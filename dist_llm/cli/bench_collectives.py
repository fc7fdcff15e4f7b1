"""`dist-llm bench collectives`: how fast do this machine's ranks talk, and what does the plan believe?"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config
from dist_llm.cli.table import table
from dist_llm.errors import ConfigError, Violation

_EPILOG = """\
  dist-llm bench collectives launcher.nproc=4
  dist-llm bench collectives launcher.nproc=8 device=cuda cluster=h100-sxm --kinds all_reduce --sizes 1MiB,256MiB --json

The ranks are started on this machine, launcher.nproc of them, and take turns over every kind and size. Figures:
  GB/s      bytes that leave a rank, as a ring sends them, over the median of rounds
  of copy   that over what all ranks copy in memory at once: the ceiling of this machine
  plan      what the cost model says with the figures of the cluster file, and how far off it is
At the end the two figures of cluster files with which the plan would be nearest, to be set by
cluster.link_gb_per_second and cluster.link_microseconds."""

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, kinds, sizes, and how long to measure."""
    parser.epilog = _EPILOG
    add_config(parser)
    parser.add_argument("--kinds", metavar="KIND,KIND", help="kinds of collectives (default: all)")
    parser.add_argument("--sizes", metavar="SIZE,SIZE", help="payloads, such as 64KiB,4MiB (default 4KiB to 16MiB)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of each (default 5)")
    add_json(parser)


def collectives(arguments: argparse.Namespace) -> Answer:
    """Time collectives."""
    from dist_llm.runtime.log import configure_logging, get_logger
    from dist_llm.train.bench_collectives import LEAVING, SIZES, bench_collectives

    config = load_config(compose_arguments(arguments), None)
    ranks = config.launcher.nproc
    kinds = arguments.kinds.split(",") if arguments.kinds is not None else [*LEAVING]
    sizes = arguments.sizes.split(",") if arguments.sizes is not None else [str(size) for size in SIZES]
    known = tuple(LEAVING)
    slips = [Violation("--kinds", kind, "is no kind that is timed", known) for kind in kinds if kind not in known]
    slips += [
        Violation("--sizes", size, "must be sizes from 4 bytes to 16 GiB, such as 64KiB,4MiB")
        for size in sizes
        if read_size(size) is None
    ]
    if not 1 <= arguments.rounds <= 10**4:
        slips.append(Violation("--rounds", arguments.rounds, "must be from 1 to 10000"))
    if ranks < 2:
        slips.append(Violation("launcher.nproc", ranks, "is too few for ranks that talk", (2,)))
    if slips:
        raise ConfigError(slips)
    configure_logging(0, arguments.debug)
    facts = bench_collectives(
        config,
        ranks,
        kinds=list(dict.fromkeys(kinds)),
        sizes=sorted({size for text in sizes if (size := read_size(text)) is not None}),
        rounds=arguments.rounds,
        report=get_logger("cli.bench").info,
    )
    return Answer(describe(facts), facts)


def read_size(text: str) -> int | None:
    """Return the bytes of a size such as 64KiB, 4MiB or 4096; None where it is none from 4 bytes to 16 GiB."""
    match = re.fullmatch(r"([0-9]{1,12})\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        return None
    size = int(match[1]) * _UNITS[match[2].upper()]
    return size if 4 <= size <= 16 * 2**30 else None


def describe(facts: Mapping[str, Any]) -> str:
    """Return the figures as text: where, a table of messages, and the link that they show."""
    where = [f"{name}: {facts[name]}" for name in ("processor", "torch", "backend", "ranks", "rounds", "cluster")]
    where.append(f"copy: {facts['copy_gb_per_second']:.2f} GB/s read by each rank, all at once")
    link = f"{facts['link_gb_per_second']:.3g}", f"{facts['link_microseconds']:.3g}"
    nearest = f"nearest to these: cluster.link_gb_per_second={link[0]} cluster.link_microseconds={link[1]}"
    return "\n".join([*where, "", table([_cells(row) for row in facts["rows"]]), "", nearest])


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "collective": row["kind"],
        "bytes": f"{row['bytes']:,}",
        "ms": f"{1e3 * row['seconds']:.3f}",
        "GB/s": f"{row['gb_per_second']:.3f}",
        "of copy": f"{100 * row['of_copy']:.1f} %",
        "plan ms": f"{1e3 * row['foretold_seconds']:.3f}",
        "plan off": f"{100 * row['foretold_error']:+.0f} %",
    }


COLLECTIVES = Command("time collectives by size, beside memory's speed and the plan's", add_arguments, collectives)
