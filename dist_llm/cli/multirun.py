"""`dist-llm launch --multirun FILE`: one run after the other of what a Hydra multirun file sweeps over.

    defaults: [base, {ladder: a}, _self_]                     base.yaml beside FILE is a whole config
    hydra: {sweeper: {params: {ladder: "a,b,c", optimizer.lr: "1e-3,3e-3"}}}     every combination is a run

All configs are checked before the first run starts, and written into configs/ beside FILE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation


def sweep_configs(file: Path) -> list[tuple[RunConfig, Path]]:
    """Return the config of every run of a multirun file with where it is written. Raises ConfigError with all wrong."""
    from dist_llm.cli.compose import compose_sweep
    from dist_llm.config.checks import decode_and_check
    from dist_llm.config.decode import decode_partly

    configs: list[RunConfig] = []
    violations: list[Violation] = []
    for tree in compose_sweep(file):
        launcher = decode_partly(tree).config.launcher
        try:
            configs.append(decode_and_check(tree, launcher.nproc * launcher.nodes, []))
        except ConfigError as error:
            violations += [each for each in error.violations if each not in violations]
    if violations := [*violations, *_name_clashes(configs)]:
        raise ConfigError(violations)
    return [(config, file.parent / "configs" / f"{config.run.name}.yaml") for config in configs]


def write_configs(jobs: Sequence[tuple[RunConfig, Path]]) -> None:
    """Write the configs of a multirun. Raises StorageError."""
    from dist_llm.config.document import render_document
    from dist_llm.planner.ladder_files import write_files

    write_files({path: render_document(config) for config, path in jobs})


def _name_clashes(configs: Sequence[RunConfig]) -> Iterator[Violation]:
    """Yield each name that several runs of a sweep have: their files would overwrite one another."""
    names = [config.run.name for config in configs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        rule = f"is the name of {names.count(name)} runs of the sweep: sweep over run.name too, or set it in each"
        yield Violation("run.name", name, rule)
