"""What a machine says of itself: versions of tools, headers, memory of a job, room on disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from sysconfig import get_paths

import pytest
import torch

from dist_llm.runtime import machine


def _tool(folder: Path, name: str, text: str, code: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    tool = folder / name
    tool.write_text(f"#!{sys.executable}\nimport sys\nprint({text!r})\nsys.exit({code})\n")
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0\nCopyright (C) 2022", "12.2.0"),
        ("g++ (GCC) 13.1.1 20230614 (Red Hat 13.1.1-4)\nCopyright (C) 2023", "13.1.1"),
        ("Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu", "14.0.6"),
        ("nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88", "13.0"),
        ("1.13.2.git.kitware.jobserver-pipe-1", "1.13.2"),
        ("no version", None),
    ],
)
def test_version_of_a_tool(tmp_path: Path, text: str, version: str | None) -> None:
    assert machine.tool_version(_tool(tmp_path, "tool", text)) == version


def test_tool_that_fails_has_no_version(tmp_path: Path) -> None:
    assert machine.tool_version(_tool(tmp_path, "tool", "1.2.3", code=1)) is None
    assert machine.tool_version(tmp_path / "absent") is None


def test_tools_are_found_where_torch_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("g++", "ninja", "nvcc", "mine"):
        _tool(tmp_path / "bin", name, "1.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert machine.find_cxx() == tmp_path / "bin" / "g++"
    assert machine.find_ninja() == tmp_path / "bin" / "ninja"
    assert machine.find_nvcc() == tmp_path / "bin" / "nvcc"
    monkeypatch.setenv("CXX", "mine -O2")
    assert machine.find_cxx() == tmp_path / "bin" / "mine"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine.find_nvcc() == tmp_path / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert machine.find_nvcc() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.find_ninja() is None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert machine.ninja_beside_python() == tmp_path / "bin" / "ninja"


def test_headers(tmp_path: Path) -> None:
    cxx = machine.find_cxx()
    assert cxx is not None, "tests/parallel/test_compile.py needs one too"
    assert machine.has_header(cxx, "vector")
    assert not machine.has_header(cxx, "nowhere_to_be_found.h")
    (tmp_path / "mine.h").write_text("")
    assert not machine.has_header(cxx, "mine.h")
    assert machine.has_header(cxx, "mine.h", str(tmp_path))
    assert not machine.has_header(tmp_path / "absent", "vector")
    assert machine.has_header(cxx, "Python.h", get_paths()["include"])


def test_memory_of_a_job_is_that_of_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (str(tmp_path / "absent"), str(tmp_path / "limit")))
    whole = machine.host_memory_gib()
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    for text, gib in {"max\n": whole, f"{2**29}\n": 0.5, f"{2**62}\n": whole}.items():
        (tmp_path / "limit").write_text(text)
        assert machine.host_memory_gib() == gib


def test_room_is_that_of_what_exists(tmp_path: Path) -> None:
    place, writable, free = machine.room(tmp_path / "runs" / "mine")
    assert (place, writable) == (tmp_path, True)
    assert free > 0
    (tmp_path / "runs").write_text("")
    assert machine.room(tmp_path / "runs" / "mine")[:2] == (tmp_path / "runs", False)


def test_torch_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, hip, words in ((None, None, "CPU"), ("13.0", None, "CUDA 13.0"), (None, "6.2", "ROCm 6.2")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert machine.torch_build() == (str(torch.__version__), f"built for {words}")
    assert "gloo" in machine.list_backends()
    assert len(machine.list_accelerators()) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
