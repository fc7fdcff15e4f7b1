"""The repository works on any machine: no path, registry or hook of one machine is in it, and the wheel is whole."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.contracts.source import ROOT, repository_files

# Hosts that text may link to: papers, projects, standards. Everything else, package registries first, is refused.
KNOWN_HOSTS = {
    "arxiv.org",
    "doi.org",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "docs.pytorch.org",
    "pytorch.org",
    "www.apache.org",
    "www.w3.org",
    "json-schema.org",
    "semver.org",
    "slurm.schedmd.com",
    "www.nvidia.com",
    "docs.nvidia.com",
    "localhost",
    "127.0.0.1",
    "example.org",
}
_URL = re.compile(r"\b(?:https?|ftp)://[^\s\"'`<>()\[\]{}\\]+")
_MACHINE_PATH = re.compile(r"(?<![\w.$~}/-])/(?:root|home|Users|work|opt|mnt|data\d*)/[\w.-]+")
_INDEX_OPTION = re.compile(r"--(?:extra-)?index-url[= ]+[\"']?(?:https?:|\w+\.\w)")
_BINARY = (".png", ".bin", ".idx", ".model", ".safetensors", ".whl")


def foreign_hosts(path: str, text: str) -> list[str]:
    """Find addresses whose host is not in KNOWN_HOSTS, and package indexes given by address."""
    findings = []
    for number, line in enumerate(text.splitlines(), 1):
        hosts = [urlsplit(match.group()).hostname for match in _URL.finditer(line)]
        findings += [f"{path}:{number}: host {host}" for host in hosts if host not in KNOWN_HOSTS]
        if _INDEX_OPTION.search(line):
            findings.append(f"{path}:{number}: a package index by address")
    return findings


def machine_paths(path: str, text: str) -> list[str]:
    """Find absolute paths that exist on one person's machine only."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{path}:{n}: path {hit.group()}" for n, line in lines for hit in _MACHINE_PATH.finditer(line)]


def foreign_hooks(text: str) -> list[str]:
    """Find pre-commit repositories that are not local."""
    return [entry["repo"] for entry in yaml.safe_load(text)["repos"] if entry["repo"] != "local"]


def _texts() -> list[tuple[str, str]]:
    names = [name for name in repository_files() if not name.endswith(_BINARY)]
    return [(name, (ROOT / name).read_text(encoding="utf-8", errors="replace")) for name in names]


def test_no_foreign_host() -> None:
    findings = [finding for path, text in _texts() for finding in foreign_hosts(path, text)]
    assert not findings, "\n".join(findings)


def test_no_machine_path() -> None:
    here = "tests/contracts/test_repository.py"
    findings = [finding for path, text in _texts() if path != here for finding in machine_paths(path, text)]
    assert not findings, "\n".join(findings)


def test_hooks_are_local() -> None:
    assert foreign_hooks((ROOT / ".pre-commit-config.yaml").read_text()) == []


def test_foreign_hosts_is_seen() -> None:
    assert foreign_hosts("a.md", "see " + "https:" + "//packages.invalid/simple") == ["a.md:1: host packages.invalid"]
    assert foreign_hosts("Makefile", "pip install --index-url " + "mirror.invalid")
    assert not foreign_hosts("a.md", "see https://arxiv.org/abs/1909.08053.")


@pytest.mark.parametrize("path", ["/root/x", "/home/ann/x", "/Users/ann", "/work/main", "/opt/wheels"])
def test_machine_paths_is_seen(path: str) -> None:
    assert machine_paths("a.md", f"run `{path}` now")
    assert not machine_paths("a.md", f"run `$HOME{path}` or `docs{path}` now")


def test_foreign_hooks_is_seen() -> None:
    assert foreign_hooks("repos:\n  - repo: elsewhere\n    hooks: []\n") == ["elsewhere"]


def _build_wheel(folder: Path) -> list[str]:
    """Build a wheel without the kernels, which take a compiler and time: tests/kernels/test_build.py builds them."""
    program = "import sys; from scikit_build_core.build import build_wheel as build; "
    program += "build(sys.argv[1], {'wheel.cmake': 'false'})"
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    shipped = _build_wheel(tmp_path)
    tracked = [name for name in repository_files() if name.startswith(("dist_llm/", "conf/", "launch/"))]
    wanted = {name if name.startswith("dist_llm/") else f"dist_llm/{name}" for name in tracked}
    assert "dist_llm/py.typed" in wanted
    assert any(name.startswith("dist_llm/conf/") for name in wanted)
    assert not wanted - set(shipped), sorted(wanted - set(shipped))
    outside = [name for name in shipped if not name.startswith("dist_llm")]
    assert not outside, outside
