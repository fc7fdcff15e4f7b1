"""Help, plans and config errors answer at once: they load no torch. Judged by the modules loaded, not by a clock."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

import pytest

from tests.contracts.interpreter import run_command, run_python
from tests.contracts.source import repository_files

HEAVY = ("torch", "matplotlib", "tensorboard", "sentencepiece", "safetensors")
CONFIG_ONLY = ("hydra", "omegaconf")
"""Allowed in cli/compose.py alone, which is imported when a command composes a config."""
LIGHT_LAYERS = ("errors", "types", "config", "accounting", "planner", "launcher", "cli")
HELP_MODULES = 150
"""Modules that `dist-llm --help` may load beyond a bare interpreter's."""
CONFIG_MODULES = 450
"""The same for a command that composes a config and refuses it; benchmarks/start.py times both."""

_IMPORT_EACH = """
import importlib, json, sys
found = []
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    for heavy in json.loads(sys.argv[2]):
        if heavy in sys.modules:
            found.append(f"{name} loads {heavy}")
            del sys.modules[heavy]
print(json.dumps(found))
"""


def heavy_imports(modules: list[str], forbidden: tuple[str, ...]) -> list[str]:
    """Import the modules in order in one fresh interpreter; return `module loads heavy module` for each that does."""
    found: list[str] = json.loads(run_python(_IMPORT_EACH, modules, forbidden))
    return found


def light_modules() -> list[str]:
    """Name every module of the layers that import no torch."""
    names = []
    for path in repository_files():
        parts = PurePosixPath(path).with_suffix("").parts
        if path.endswith(".py") and parts[0] == "dist_llm" and len(parts) > 1 and parts[1] in LIGHT_LAYERS:
            names.append(".".join(parts).removesuffix(".__init__"))
    return names


def test_light_layers_load_nothing_heavy() -> None:
    modules = light_modules()
    assert {"dist_llm.errors", "dist_llm.config.run", "dist_llm.cli.main", "dist_llm.launcher.local"} <= set(modules)
    modules.remove("dist_llm.cli.compose")
    assert heavy_imports(modules, HEAVY + CONFIG_ONLY) == []
    assert heavy_imports(["dist_llm.cli.compose"], HEAVY) == []


def test_heavy_imports_is_seen() -> None:
    assert heavy_imports(["json", "safetensors"], HEAVY) == ["safetensors loads safetensors"]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["launch", "--help"]], ids=" ".join)
def test_help_is_light(words: list[str]) -> None:
    answer = run_command(words)
    assert answer.code == 0
    assert "dist-llm" in answer.text
    assert [name for name in answer.loaded if name in HEAVY + CONFIG_ONLY] == []
    assert len(answer.loaded) <= HELP_MODULES, f"{len(answer.loaded)} modules: {answer.loaded}"


def test_config_error_is_light() -> None:
    answer = run_command(["train", "parallel.tensor=3", "model.num_heads=8", "optimizer.lrr=1"])
    assert answer.code == 78
    assert "Traceback" not in answer.text
    assert "parallel.tensor=3" in answer.text
    assert "optimizer.lrr" in answer.text
    assert [name for name in answer.loaded if name in HEAVY] == []
    assert len(answer.loaded) <= CONFIG_MODULES, f"{len(answer.loaded)} modules: {answer.loaded}"
