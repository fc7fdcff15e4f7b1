"""A wheel is built whatever there is to build with: without a compiler it has no library, and says why."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.contracts.source import ROOT

PROGRAM = (
    "import sys; from scikit_build_core.build import build_wheel; "
    "build_wheel(sys.argv[1], {'build-dir': sys.argv[2], 'cmake.define.DLLM_CUDA': sys.argv[3]})"
)
FOLDER = "dist_llm/ops/"


def _build(folder: Path, cuda: str = "AUTO", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(folder / "build"), cuda]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def _only_build_tools(folder: Path) -> str:
    """Return a search path with cmake and ninja alone."""
    for name in ("cmake", "ninja"):
        (folder / name).symlink_to(Path(sys.executable).parent / name)
    return str(folder)


def test_without_a_compiler_the_wheel_has_no_library_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = _build(tmp_path, PATH=_only_build_tools(tmp_path / "bin"), CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*-py3-none-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        facts = json.loads(archive.read(f"{FOLDER}_C.json"))
    assert facts == {"built": False, "reason": "no C++ compiler was found when it was installed"}
    assert not [name for name in names if name.endswith(".so")]
    assert {"dist_llm/conf/config.yaml", "dist_llm/launch/slurm.sbatch"} <= names


@pytest.mark.parametrize(
    ("cuda", "words"), [("ON", "DLLM_CUDA=ON: "), ("YES", "DLLM_CUDA=YES must be AUTO, ON or OFF")]
)
def test_what_cannot_be_built_is_refused(cuda: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = _build(tmp_path, cuda, PATH=_only_build_tools(tmp_path / "bin"), CXX="no-such-compiler")
    assert done.returncode != 0
    assert words in done.stdout + done.stderr


@pytest.mark.slow
def test_with_a_compiler_the_wheel_has_the_library(tmp_path: Path) -> None:
    """Named for any Python, since the library knows none, and whole by the checksum beside it."""
    done = _build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*-py3-none-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        facts = json.loads(archive.read(f"{FOLDER}_C.json"))
        library = archive.read(f"{FOLDER}_C.abi3.so")
    assert facts["built"]
    assert facts["sha256"] == hashlib.sha256(library).hexdigest()
