"""A ladder as files: a config a run, a shell script, a SLURM array, and a Hydra multirun over a config group.

    DIR/configs/NAME.yaml   whole configs, for `dist-llm launch --config`
    DIR/run.sh              all runs, one after the other; a run that is done is passed over
    DIR/array.sbatch        the same as a job array, one task a run
    DIR/sweep.yaml          a multirun of DIR/ladder/*.yaml (what each run sets), for a Hydra application

Every value in a script is quoted.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from dist_llm.config.document import render_document
from dist_llm.errors import StorageError
from dist_llm.planner.ladder import LadderRun
from dist_llm.telemetry.records import write_whole


def ladder_files(runs: list[LadderRun], folder: Path) -> dict[Path, str]:
    """Return the text of each file of a ladder by its path, configs named as they will lie in `folder`."""
    configs = {folder / "configs" / f"{run.name}.yaml": render_document(run.config) for run in runs}
    groups = {folder / "ladder" / f"{run.name}.yaml": _group_entry(run) for run in runs}
    paths = [str(path) for path in configs]
    return {
        **configs,
        **groups,
        folder / "run.sh": _script(paths),
        folder / "array.sbatch": _array(paths),
        folder / "sweep.yaml": _sweep(runs),
    }


def write_ladder(runs: list[LadderRun], folder: Path) -> list[Path]:
    """Write a ladder's files, each whole or not at all, and return their paths. Raises StorageError."""
    files = ladder_files(runs, folder)
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {path.parent}: {error.strerror}") from error
        write_whole(path, text)
    return list(files)


def _script(paths: list[str]) -> str:
    lines = [f"dist-llm launch --config {shlex.quote(path)}" for path in paths]
    return "\n".join(["#!/bin/sh", "set -e", *lines, ""])


def _array(paths: list[str]) -> str:
    quoted = "\n".join(f"  {shlex.quote(path)}" for path in paths)
    return (
        "#!/bin/bash\n"
        "#SBATCH --job-name=ladder\n"
        f"#SBATCH --array=0-{len(paths) - 1}\n"
        f"configs=(\n{quoted}\n)\n"
        'exec dist-llm launch --config "${configs[$SLURM_ARRAY_TASK_ID]}"\n'
    )


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
        "defaults": [{"ladder": names[0]}, "_self_"],
        "hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"ladder": ",".join(names)}}},
    }
    return yaml.safe_dump(tree, sort_keys=False)
