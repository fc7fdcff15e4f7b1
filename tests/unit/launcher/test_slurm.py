"""Job scripts of SLURM: they parse, hold what the config says, and pass no value to a shell."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, StorageError
from dist_llm.launcher.base import plan_launch, worker_argv
from dist_llm.launcher.slurm import render_job, submit
from tests.unit.config.trees import config_with

HOSTILE = ["$(touch canary)", "`touch canary`", "a; touch canary", "a\ntouch canary", "' \" \\ | & > canary", "$HOME"]


def _script(words: list[str], **changes: object) -> str:
    settings = {"launcher__name": "slurm", "launcher__nodes": 4, "launcher__nproc": 8, "device": "cuda", **changes}
    config: RunConfig = config_with(**settings)
    return render_job(plan_launch(worker_argv(words), config.launcher, config.parallel), config)


def test_it_says_what_the_config_says() -> None:
    script = _script(["--config", "plan.yaml"], run__name="big")
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--job-name=big", "--signal=TERM@120"):
        assert f"#SBATCH {line}\n" in script
    assert "-m dist_llm train --config plan.yaml\n" in script
    assert "--cpus-per-task=3\n" in _script([], device="cpu", launcher__threads=3)


def test_directives_come_before_commands() -> None:
    lines = _script([]).splitlines()
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]


@pytest.mark.parametrize("word", HOSTILE)
def test_no_value_reaches_the_shell(word: str, tmp_path: Path) -> None:
    script = _script([word])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    stubs = """
scontrol() { echo node1; }
srun() { printf '%s\\0' "$@" > argv; }
SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1
"""
    subprocess.run(["bash"], input=stubs + script, text=True, check=True, cwd=tmp_path)
    assert not (tmp_path / "canary").exists()
    assert (tmp_path / "argv").read_text().split("\0")[-2] == word


@pytest.mark.parametrize(("cores", "named"), [("", "unset"), ("SLURM_CPUS_PER_TASK=3", "3")])
def test_ranks_of_gpus_share_all_cores_of_a_node(cores: str, named: str, tmp_path: Path) -> None:
    stubs = f"""
scontrol() {{ echo node1; }}
srun() {{ echo "${{SRUN_CPUS_PER_TASK-unset}}" > cores; }}
SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1 {cores}
"""
    subprocess.run(["bash"], input=stubs + _script([]), text=True, check=True, cwd=tmp_path)
    assert (tmp_path / "cores").read_text().strip() == named


def test_a_run_that_saved_is_queued_again(tmp_path: Path) -> None:
    stubs = 'scontrol() { echo "$@" >> asked; }\nsrun() { return 75; }\nSLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1\n'
    done = subprocess.run(["bash"], input=stubs + _script([]), text=True, check=False, cwd=tmp_path)
    assert done.returncode == 75
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 7"


def test_a_folder_with_blanks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run.dir=.* must have no blanks"):
        _script([], run__dir="my runs")


def _sbatch(folder: Path, text: str) -> None:
    (folder / "sbatch").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "sbatch").chmod(0o755)


def test_submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs sbatch, which is not on PATH"):
        submit("script", tmp_path / "runs")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    _sbatch(tmp_path, f"cat > {shlex.quote(str(tmp_path / 'seen'))}; echo '42;cluster'")
    assert submit("script", tmp_path / "runs") == "42"
    assert (tmp_path / "seen").read_text() == "script"
    _sbatch(tmp_path, "echo 'no such partition' >&2; exit 1")
    with pytest.raises(StorageError, match="no such partition"):
        submit("script", tmp_path / "runs")
