"""`dist-llm train`: this process is one rank; compose, decode, check, then call the trainer."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config, require_with_json
from dist_llm.errors import ConfigError, LayoutError
from dist_llm.runtime.ranks import RankInfo, discover_ranks

if TYPE_CHECKING:
    from dist_llm.config.run import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, and --cfg to print it."""
    add_config(parser)
    parser.add_argument("--cfg", action="store_true", help="print the resolved config and stop")
    add_json(parser, "--cfg")


def main(arguments: argparse.Namespace) -> Answer:
    """Train as the rank that the launcher made of this process, or print the config under --cfg."""
    from dist_llm.config.document import render_document

    require_with_json(arguments, "--cfg", arguments.cfg)
    composed = compose_arguments(arguments)
    if arguments.cfg:
        config = load_config(composed, None)
        return Answer(render_document(config).rstrip(), config.model_dump(mode="json"))
    ranks = discover_ranks()
    if ranks.world_size > 1:
        arguments.speaker, arguments.follows = f"dist-llm rank {ranks.rank}", ranks.local_rank > 0
    try:
        config = load_config(composed, ranks.world_size)
    except ConfigError as error:
        error.shared = True
        if isinstance(error, LayoutError) and ranks.world_size == 1:
            error.add_note(_how_to_launch(arguments, load_config(composed, None), error))
        raise
    return Answer(code=_train(config_text=render_document(config), config=config, ranks=ranks, debug=arguments.debug))


def _train(config_text: str, config: RunConfig, ranks: RankInfo, debug: bool) -> int:
    """Load the trainer (and torch with it) and run it."""
    from dist_llm.cli.finish import try_keepsakes
    from dist_llm.runtime.log import configure_logging
    from dist_llm.train.setup import run

    configure_logging(ranks.rank, debug)
    outcome = run(config, config_text, ranks)
    if outcome.report_due and ranks.rank == 0:
        try_keepsakes(config.run.folder, config.telemetry)
    return int(outcome.code)


def _how_to_launch(arguments: argparse.Namespace, config: RunConfig, error: LayoutError) -> str:
    """Return the command that starts the ranks which a lone process lacks: as many as configured, if they fit."""
    from dist_llm.config.checks import check

    words = list(arguments.overrides)
    if arguments.config_file is not None:
        words = ["--config", str(arguments.config_file), *words]
    legal = error.violations[0].legal
    if legal and check(config, config.launcher.nproc * config.launcher.nodes):
        words.append(f"launcher.nproc={legal[0]}")
    return f"this process was started alone; start all ranks with: dist-llm launch {shlex.join(words)}"


TRAIN = Command(
    "train as one rank, as torchrun, srun or mpirun numbered it, or alone", add_arguments, main, preemptible=True
)
