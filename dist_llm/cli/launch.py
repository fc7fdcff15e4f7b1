"""`dist-llm launch`: check the config once, without torch, then start ranks of `dist-llm train` with the same words, or
submit the job that does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config, require_with_json
from dist_llm.errors import ConfigError, LayoutError

if TYPE_CHECKING:
    from dist_llm.config.run import RunConfig
    from dist_llm.launcher.base import LaunchPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config or a sweep of configs, and --dry-run."""
    add_config(parser)
    words = "launch every run that a Hydra multirun file sweeps over, one after the other (docs/plan.md)"
    parser.add_argument("--multirun", type=Path, metavar="FILE", help=words)
    parser.add_argument("--dry-run", action="store_true", help="print the command and the map of ranks, start nothing")
    add_json(parser, "--dry-run")


def main(arguments: argparse.Namespace) -> Answer:
    """Start the configured ranks and return the exit code of the rank at fault."""
    require_with_json(arguments, "--dry-run", arguments.dry_run)
    if arguments.multirun is not None:
        return _multirun(arguments)
    return _launch(_checked(arguments), _worker_words(arguments), arguments)


def _launch(config: RunConfig, words: list[str], arguments: argparse.Namespace) -> Answer:
    """Start the ranks of one run, whose config the words after `dist-llm train` make."""
    from dist_llm.launcher.base import plan_launch, worker_argv

    plan = plan_launch(worker_argv(words), config.launcher, config.parallel)
    if config.launcher.name == "slurm":
        return _slurm(plan, config, arguments.dry_run)
    if arguments.dry_run:
        return Answer(str(plan), plan.as_json())
    done = _finished_step(config)
    if done is not None:
        where = f"step {done} of {config.run.steps}, see {config.run.folder}"
        return Answer(f"run {config.run.name} is done: {where}")
    from dist_llm.launcher.local import launch_local

    return Answer(code=launch_local(plan.argv, config.launcher.nproc, debug=arguments.debug))


def _multirun(arguments: argparse.Namespace) -> Answer:
    """Launch every run of a sweep, one after the other; the first that fails ends it, with its exit code."""
    from dist_llm.cli.multirun import sweep_configs, write_configs
    from dist_llm.cli.say import say_on_stderr

    if arguments.overrides or arguments.config_file is not None:
        raise ConfigError("--multirun takes no overrides and no --config: the file says all")
    jobs = sweep_configs(arguments.multirun)
    if not arguments.dry_run:
        write_configs(jobs)
    debug = ["--debug"] if arguments.debug else []
    told: list[Answer] = []
    for config, path in jobs:
        answer = _launch(config, [*debug, "--config", str(path)], arguments)
        if answer.code:
            say_on_stderr(f"dist-llm launch: the sweep ends with run {config.run.name}")
            return Answer("\n".join(each.text for each in told if each.text), code=answer.code)
        told.append(answer)
    return Answer("\n\n".join(each.text for each in told if each.text), {"runs": [each.data for each in told]})


def _slurm(plan: LaunchPlan, config: RunConfig, dry_run: bool) -> Answer:
    """Return the job script and the map of ranks, or submit the script and return the job's number."""
    from dist_llm.launcher.slurm import render_job, submit

    script = render_job(plan, config)
    if dry_run:
        return Answer(f"{script}\n{plan}", {**plan.as_json(), "script": script})
    job = submit(script, config.run.folder.parent)
    return Answer(f"submitted as job {job}: squeue -j {job}")


def _finished_step(config: RunConfig) -> int | None:
    """Return the step at which this very run has ended, or None when ranks have something to do."""
    from dist_llm.checkpoint.inspect import verify
    from dist_llm.checkpoint.storage import step_directory
    from dist_llm.config.document import render_document
    from dist_llm.telemetry.records import finished_step

    step = None if config.run.resume == "never" else finished_step(config.run.folder, render_document(config))
    return None if step is None or verify(step_directory(config.run.folder / "checkpoints", step)) else step


def _checked(arguments: argparse.Namespace) -> RunConfig:
    """Return the config if it can run on the ranks that it asks the launcher for."""
    from dist_llm.config.decode import decode_partly

    composed = compose_arguments(arguments)
    decoded = decode_partly(composed.tree)
    unknown = any(key.partition(".")[0] == "launcher" for key in (*decoded.unusable, *composed.unusable))
    world_size = None if unknown else decoded.config.launcher.nproc * decoded.config.launcher.nodes
    try:
        return load_config(composed, world_size)
    except LayoutError as error:
        nproc = decoded.config.launcher.nproc
        error.add_note(f"launcher.nproc={nproc} starts that many: change it, or the layout")
        raise


def _worker_words(arguments: argparse.Namespace) -> list[str]:
    """Return the words after `dist-llm train` that make the same config."""
    debug = ["--debug"] if arguments.debug else []
    file = ["--config", str(arguments.config_file)] if arguments.config_file is not None else []
    return [*debug, *file, *arguments.overrides]


LAUNCH = Command("start the ranks of a run, here or as a SLURM job, and train", add_arguments, main, preemptible=True)
