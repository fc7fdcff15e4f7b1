"""`dist-llm doctor`: what is here, missing or wrong, and whether that keeps the config from training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli.main import main
from dist_llm.config.extensions import Extension, find_extension
from dist_llm.errors import ExitCode
from dist_llm.launcher import preflight
from dist_llm.runtime import machine

ROOT = Path(__file__).parents[3]
H100 = machine.Accelerator("NVIDIA H100", 79.6)

Examine = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def examine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    """Run doctor --json, check its exit code against its words, and return its checks by name."""

    def run(*words: str, fit: bool = True) -> dict[str, dict[str, Any]]:
        code = main(["doctor", "--json", f"run.dir={tmp_path / 'runs'}", *words])
        facts = json.loads(capsys.readouterr().out)
        assert code == (ExitCode.DONE if fit else ExitCode.CONFIG), facts
        assert facts["ok"] is fit
        assert fit is not any(row["stops"] for row in facts["checks"])
        return {row["name"]: row for row in facts["checks"]}

    return run


def _pretend(monkeypatch: pytest.MonkeyPatch, **answers: object) -> None:
    """Have the machine answer so."""
    for name, answer in answers.items():
        monkeypatch.setattr(machine, name, lambda *_, answer=answer: answer)


def _find(monkeypatch: pytest.MonkeyPatch, name: str, place: str | None, problem: str | None = None) -> None:
    """Have one optional package be there, wrong or missing."""

    def found(wanted: str) -> Extension:
        here = find_extension(wanted)
        return replace(here, version=None, place=place, problem=problem) if here.name == name else here

    for module in ("config.checks", "config.engine_rules", "launcher.preflight"):
        monkeypatch.setattr(f"dist_llm.{module}.find_extension", found)


def test_this_machine_trains_with_every_engine(examine: Examine) -> None:
    for engine in ("native", "deepspeed", "megatron"):
        rows = examine(f"engine={engine}", "device=cpu")
        assert all(rows[f"engine {name}"]["status"] == "ok" for name in ("native", "deepspeed", "megatron"))
        assert [name for name, row in rows.items() if row["needed"] and "engine " in name] == [f"engine {engine}"]
    assert {"python", "torch", "device", "cores", "gloo", "nccl", "apex", "C++ compiler", "inductor", "run.dir"} <= set(
        rows
    )


def test_table_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", f"run.dir={tmp_path}", "device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "status", "version", "note"]
    assert lines[-1] == "this machine is fit to train with engine=native"
    python = ".".join(str(part) for part in sys.version_info[:3])
    assert next(line for line in lines if line.startswith("python ")).split() == ["python", "ok", python]
    assert len({line.index("ok") for line in lines if " ok " in line}) == 1, "columns"


def test_missing_engine(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _find(monkeypatch, "megatron-core", None)
    row = examine("engine=megatron", fit=False)["engine megatron"]
    assert (row["status"], row["note"]) == ("missing", "pip install 'dist-llm[megatron]'")
    assert examine("engine=native")["engine megatron"]["status"] == "missing"
    assert main(["doctor", "engine=megatron", f"run.dir={tmp_path}"]) == ExitCode.CONFIG
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "this machine is not fit to train with engine=megatron:",
        "  engine megatron is missing: pip install 'dist-llm[megatron]'",
    ]


def test_wrong_packages(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    _find(monkeypatch, "apex", "/x/apex", "/x/apex is not NVIDIA's apex: pip uninstall apex")
    row = examine()["apex"]
    assert (row["status"], row["note"]) == ("wrong", "/x/apex is not NVIDIA's apex: pip uninstall apex")
    _find(monkeypatch, "deepspeed", "/x/deepspeed", "/x/deepspeed is not DeepSpeed: move it")
    rows = examine("engine=deepspeed", fit=False)
    assert (rows["engine deepspeed"]["status"], rows["config"]["status"]) == ("wrong", "ok")


def test_cuda(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sees no CUDA device" in examine("device=cuda", fit=False)["device"]["note"]
    _pretend(monkeypatch, list_accelerators=[H100, H100], list_backends=["gloo"], torch_build=("2.13.0", "x"))
    assert examine("device=auto", fit=False)["nccl"]["note"] == "torch was built without nccl"
    _pretend(monkeypatch, list_backends=["gloo", "nccl"])
    rows = examine("device=auto", "launcher.nproc=2")
    assert rows["cuda:1"]["note"] == "NVIDIA H100, 79.6 GiB"
    assert rows["device"]["note"] == "cuda"
    assert "use 2, or device=cpu" in examine("launcher.nproc=3", fit=False)["device"]["note"]
    assert "cuda:0" not in examine("device=cpu", "launcher.nproc=3")
    _pretend(monkeypatch, list_accelerators=[], torch_build=("2.13.0", "built for CUDA 13.0"))
    assert examine()["device"]["note"] == "cpu, since torch sees no CUDA device"


def test_compilers_are_needed_where_kernels_are(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, find_cxx=None, find_ninja=None, ninja_beside_python=None, find_nvcc=None)
    rows = examine()
    for name in ("C++ compiler", "ninja", "nvcc", "libaio", "inductor"):
        assert rows[name]["status"] == "missing", name
    assert "parallel.compile_backend=aot_eager" in examine("parallel.compile=true", fit=False)["inductor"]["note"]
    examine("parallel.compile=true", "parallel.compile_backend=aot_eager")
    nvme = ("engine=deepspeed", "engine.offload_to=nvme", "engine.nvme_path=.", "parallel.offload=optimizer")
    rows = examine(*nvme, "parallel.zero=3", fit=False)
    assert [name for name, row in rows.items() if row["stops"]] == ["C++ compiler", "ninja", "libaio"]


def test_inductor_needs_headers(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, find_cxx=Path("c++"), has_header=False, tool_version="1.0")
    assert "has no Python.h" in examine("parallel.compile=true", fit=False)["inductor"]["note"]


def test_ninja_outside_the_path(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, find_ninja=None, ninja_beside_python=Path("/venv/bin/ninja"), tool_version="1.13")
    row = examine()["ninja"]
    assert (row["status"], row["version"]) == ("missing", "1.13")
    assert "activate the environment" in row["note"]


def test_folder_that_cannot_be_written(examine: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    assert "cannot be written: use another run.dir" in examine(fit=False)["run.dir"]["note"]
    _pretend(monkeypatch, room=(tmp_path, True, 0.0625))
    row = examine()["shared memory"]
    assert (row["status"], row["stops"]) == ("wrong", False)


def test_old_python_and_torch(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, torch_build=("2.10.1+cpu", "built for CPU"))
    assert examine(fit=False)["torch"]["note"] == "needs 2.11: pip install --upgrade torch"
    _pretend(monkeypatch, torch_build=("2.11.0a0+git1", "built for CPU"))
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    assert examine(fit=False)["python"]["note"] == "needs 3.11 to below 3.14"


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = (".".join(str(part) for part in version) for version in preflight.PYTHONS)
    assert project["requires-python"] == f">={low},<{high}"
    assert "torch>=" + ".".join(str(part) for part in preflight.OLDEST_TORCH) in project["dependencies"]


def test_check_that_fails_is_a_finding(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libtorch.so: cannot open\nshared object")

    monkeypatch.setattr(machine, "torch_build", broken)
    row = examine(fit=False)["torch"]
    assert (row["status"], row["note"]) == ("wrong", "libtorch.so: cannot open shared object")


def test_config_that_cannot_run(examine: Examine, capsys: pytest.CaptureFixture[str]) -> None:
    rows = examine("engine=megatron", "parallel.zero=3", fit=False)
    assert rows["config"]["note"].startswith("engine.name=megatron shards optimizer state alone")
    assert main(["doctor", "run.stepz=1"]) == ExitCode.CONFIG
    assert "did you mean run.steps?" in capsys.readouterr().err


def test_optional_packages_that_a_config_needs(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    _find(monkeypatch, "wandb", None)
    assert examine()["wandb"]["stops"] is False
    assert examine("telemetry.wandb=true", fit=False)["wandb"]["stops"] is True
    _find(monkeypatch, "transformer-engine", None)
    rows = examine("engine=megatron", "engine.fp8=hybrid", fit=False)
    assert (rows["transformer-engine"]["stops"], rows["config"]["status"]) == (True, "ok")


_HIDING = """
import sys
class Hides:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hides())
from dist_llm.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("deepspeed", "needs DeepSpeed: pip install 'dist-llm[deepspeed]'; use native or megatron"),
        ("megatron", "needs Megatron-Core: pip install 'dist-llm[megatron]'; use native or deepspeed"),
    ],
)
def test_train_without_the_package(engine: str, message: str) -> None:
    words = [sys.executable, "-c", _HIDING, engine, "train", f"engine={engine}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (ExitCode.CONFIG, "")
    assert done.stderr.splitlines() == [
        "dist-llm: 1 setting cannot be used:",
        f"  engine.name={engine} {message}",
    ]


def test_train_with_another_package_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise SystemExit('imported')")
    words = [sys.executable, "-m", "dist_llm", "train", "engine=megatron"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == ExitCode.CONFIG
    (line,) = done.stderr.splitlines()[1:]
    assert f"needs Megatron-Core, but {tmp_path / 'megatron'} is not of Megatron-Core" in line
    assert line.endswith("pip install 'dist-llm[megatron]'; use native or deepspeed")


def test_backends_of_operations_are_listed_with_why_not(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = examine("device=cpu")
    assert checks["apex kernels"]["note"] == "apex's rms_norm is for cuda alone, not cpu"
    assert checks["onednn kernels"]["note"] == "for cpu: linear"
    _pretend(monkeypatch, list_accelerators=[H100])
    monkeypatch.setattr("dist_llm.ops.registry.triton_problem", lambda device: f"of no use on {device}")
    checks = examine("kernels.required=true", "kernels.rope=triton", fit=False)
    triton = checks["triton kernels"]
    assert (triton["status"], triton["note"], triton["stops"]) == ("missing", "of no use on cuda", True)
    assert not checks["apex kernels"]["stops"]
