"""`launcher=slurm`: a job of `sbatch` whose srun starts one task a rank; ranks read where they are from SLURM.

The script is launch/slurm.sbatch filled in; --dry-run prints it. Every value that enters it is quoted or a number.
Partition, account and time limit sbatch reads from SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
SIGTERM comes NOTICE_SECONDS before the time limit: ranks save, exit with 75, and the job is put back into the queue.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from string import Template

import dist_llm
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, StorageError, Violation
from dist_llm.launcher.base import LaunchPlan

NOTICE_SECONDS = 120
"""Time that ranks have to save before the limit; SLURM may send the signal up to a minute early."""


def render_job(plan: LaunchPlan, config: RunConfig) -> str:
    """Return the job script that starts a plan's ranks. Raises ConfigError where a folder cannot be named in it."""
    folder = str(config.run.folder.expanduser())
    if any(character.isspace() for character in folder):
        raise ConfigError(
            [Violation("run.dir", folder, "must have no blanks under launcher=slurm, whose log is there")]
        )
    return _fill(plan, config, f"#SBATCH --output={folder}.slurm-%j.log", shlex.join(plan.argv))


def render_array(plan: LaunchPlan, config: RunConfig, files: Sequence[Path]) -> str:
    """Return the script of a job array: each task starts a plan's ranks with one of the config files.

    All runs have the ranks and devices of `config`. The tasks' logs lie where the script is submitted.
    """
    head = f"#SBATCH --array=0-{len(files) - 1}\n#SBATCH --output=slurm-%A-%a.log"
    names = "\n".join(f"  {shlex.quote(str(file))}" for file in files)
    chosen = '"${configs[$SLURM_ARRAY_TASK_ID]}"'
    return _fill(plan, config, head, f"{shlex.join(plan.argv)} --config {chosen}", f"\nconfigs=(\n{names}\n)")


def _fill(plan: LaunchPlan, config: RunConfig, head: str, command: str, setup: str = "") -> str:
    """Return the template with the plan's sizes; head: its own directives, setup: lines before commands."""
    on_cuda = config.device == "cuda" or (config.device == "auto" and config.cluster.device == "cuda")
    return Template(_template().read_text(encoding="utf-8")).substitute(
        job=config.run.name,
        nodes=plan.nodes,
        nproc=plan.nproc,
        devices=f"#SBATCH --gpus-per-node={plan.nproc}" if on_cuda else f"#SBATCH --cpus-per-task={_threads(config)}",
        head=head,
        setup=setup,
        notice_seconds=NOTICE_SECONDS,
        command=command,
    )


def submit(script: str, logs: Path) -> str:
    """Give the script to `sbatch`, which writes into `logs`; return the job's number. ConfigError without SLURM."""
    program = shutil.which("sbatch")
    if program is None:
        rule = "needs sbatch, which is not on PATH here; --dry-run prints the job script"
        raise ConfigError([Violation("launcher.name", "slurm", rule, ("local",))])
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {logs} for the job's log: {error.strerror}") from error
    done = subprocess.run([program, "--parsable"], input=script, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise StorageError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]


def _threads(config: RunConfig) -> int:
    return config.launcher.threads or 1


def _template() -> Path:
    """Return the template: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(dist_llm.__file__).resolve().parent
    for folder in (package / "launch", package.parent / "launch"):
        if (folder / "slurm.sbatch").is_file():
            return folder / "slurm.sbatch"
    raise ConfigError(f"this installation has no job templates: there is no launch/ in {package} or beside it")
