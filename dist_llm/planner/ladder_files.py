"""A ladder as files: a config a run, a shell script, a job array of SLURM, and a Hydra multirun.

    DIR/configs/NAME.yaml   whole configs, for `dist-llm launch --config`
    DIR/run.sh              all runs, one after the other; a run that is done is passed over
    DIR/array.sbatch        a job array, one task a run                        (launcher/slurm.py)
    DIR/sweep.yaml          a multirun of DIR/base.yaml with each of DIR/ladder/*.yaml, which say what a run sets:
                            `dist-llm launch --multirun`, or any Hydra application

Every value in a script is quoted.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from dist_llm.config.document import render_document
from dist_llm.errors import StorageError
from dist_llm.planner.ladder import LadderRun
from dist_llm.telemetry.records import write_whole


def config_paths(runs: list[LadderRun], folder: Path) -> list[Path]:
    """Return where the config of each run of a ladder lies."""
    return [folder / "configs" / f"{run.name}.yaml" for run in runs]


def ladder_files(runs: list[LadderRun], folder: Path, array: str) -> dict[Path, str]:
    """Return the text of each file of a ladder by its path; array: the script of the job array."""
    paths = config_paths(runs, folder)
    configs = {path: render_document(run.config) for path, run in zip(paths, runs, strict=True)}
    groups = {folder / "ladder" / f"{run.name}.yaml": _group_entry(run) for run in runs}
    return {
        **configs,
        **groups,
        folder / "base.yaml": render_document(runs[0].config),
        folder / "sweep.yaml": _sweep(runs),
        folder / "run.sh": _script(paths),
        folder / "array.sbatch": array,
    }


def write_files(files: Mapping[Path, str]) -> list[Path]:
    """Write files, each whole or not at all, and return their paths. Raises StorageError."""
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {path.parent}: {error.strerror}") from error
        write_whole(path, text)
    return list(files)


def _script(paths: list[Path]) -> str:
    lines = [f"dist-llm launch --config {shlex.quote(str(path))}" for path in paths]
    return "\n".join(["#!/bin/sh", "set -e", *lines, ""])


def _group_entry(run: LadderRun) -> str:
    """Return what a run sets, as an entry of a Hydra config group."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in run.overrides.items():
        section, _, setting = key.partition(".")
        sections.setdefault(section, {})[setting] = value
    return "# @package _global_\n" + yaml.safe_dump(sections, sort_keys=False)


def _sweep(runs: list[LadderRun]) -> str:
    names = [run.name for run in runs]
    tree = {
        "defaults": ["base", {"ladder": names[0]}, "_self_"],
        "hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"ladder": ",".join(names)}}},
    }
    return yaml.safe_dump(tree, sort_keys=False)
