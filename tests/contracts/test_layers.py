"""import-linter's contracts hold on the package, and fail on a package that breaks them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.contracts.source import ROOT

LAYERS = ["cli", "launcher", "train", "engine", "checkpoint", "telemetry", "models", "parallel", "optim", "data"]
LAYERS += ["planner", "ops", "runtime", "accounting", "config"]


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _skeleton(folder: Path, **modules: str) -> Path:
    """Write a package with every layer and the given module texts (`errors="import ..."`), under our contracts."""
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    package = folder / "dist_llm"
    for name in LAYERS:
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text("")
    for name in ("__init__", "types", "errors"):
        (package / f"{name}.py").write_text("")
    (package / "cli" / "compose.py").write_text("import hydra\nimport omegaconf\n")
    for name, text in modules.items():
        file = package / f"{name}.py"
        (file if file.exists() else package / name / "__init__.py").write_text(text)
    return folder


def test_the_layers_are_those_of_the_design() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["id"] == "layers")
    assert [layer.replace("(", "").replace(")", "") for layer in layers] == [
        "cli",
        "launcher | train | evaluate",
        "planner | engine",
        "checkpoint | telemetry",
        "models | parallel | optim | data",
        "ops | runtime | accounting",
        "types",
        "config",
        "errors",
    ]


def test_layers_hold() -> None:
    done = _lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sound_skeleton_passes(tmp_path: Path) -> None:
    done = _lint(_skeleton(tmp_path, engine="import dist_llm.parallel\nimport torch\n"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "text", "broken"),
    [
        ("errors", "import dist_llm.config\n", "layers"),
        ("models", "import dist_llm.parallel\n", "layers"),
        ("data", "def f():\n    from dist_llm.engine import x\n", "layers"),
        ("launcher", "import dist_llm.train\n", "layers"),
        ("config", "def f():\n    import torch\n", "torch"),
        ("train", "from omegaconf import OmegaConf\n", "Hydra"),
    ],
)
def test_a_broken_layer_is_seen(tmp_path: Path, module: str, text: str, broken: str) -> None:
    done = _lint(_skeleton(tmp_path, **{module: text}))
    assert done.returncode != 0, done.stdout
    line = next(line for line in done.stdout.splitlines() if "BROKEN" in line)
    assert broken in line, done.stdout


def test_a_layer_outside_the_list_is_seen(tmp_path: Path) -> None:
    folder = _skeleton(tmp_path)
    (folder / "dist_llm" / "stray.py").write_text("")
    assert _lint(folder).returncode != 0
