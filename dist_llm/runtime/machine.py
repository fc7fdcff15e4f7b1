"""What this machine has: torch's build, devices, memory, backends, compilers, headers, room. Loads torch if asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_GIB = 2**30
_SECONDS = 30.0
"""Time that a tool has to say its version, or a compiler to read a header."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_NUMBER = r"(\d+(?:\.\d+)+)"
_VERSIONS = (rf"release {_NUMBER}", rf"\A.*\s{_NUMBER}$", _NUMBER)
"""How nvcc, g++ (after its packager's version, in brackets) and others say their version."""


@dataclass(frozen=True)
class Accelerator:
    """A CUDA device: its name, and its memory in GiB."""

    name: str
    memory_gib: float


def torch_build() -> tuple[str, str]:
    """Return torch's version, and what it was built for in words. Raises ImportError or OSError where it is broken."""
    import torch

    if torch.version.cuda is not None:
        return str(torch.__version__), f"built for CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return str(torch.__version__), f"built for ROCm {torch.version.hip}"
    return str(torch.__version__), "built for CPU"


def list_accelerators() -> list[Accelerator]:
    """Return the CUDA devices that torch sees, none where it sees none."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Accelerator(device.name, device.total_memory / _GIB) for device in found]


def list_backends() -> list[str]:
    """Return the backends of process groups that torch was built with: gloo, nccl, mpi."""
    import torch.distributed as dist

    if not dist.is_available():
        return []
    built = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, there in built.items() if there]


def host_memory_gib() -> float:
    """Return the memory of this host in GiB, or what the job's control group lets it have, if that is less."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdecimal():
            least = min(least, int(text))
    return least / _GIB


def processor_maker() -> str:
    """Return what this host's processor says of its maker (AuthenticAMD, GenuineIntel), or nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def find_cxx() -> Path | None:
    """Return the C++ compiler: CXX if that is set, else the first of c++, g++ and clang++ on the path."""
    named = os.environ.get("CXX", "").split()
    return _first_on_path(tuple(named[:1]) or ("c++", "g++", "clang++"))


def find_nvcc() -> Path | None:
    """Return the CUDA compiler: that of CUDA_HOME, else the one on the path, else that of the usual folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual = Path("/usr/local/cuda/bin/nvcc")
    if home:
        return _first_on_path((str(Path(home) / "bin" / "nvcc"),))
    return _first_on_path(("nvcc", str(usual)))


def find_ninja() -> Path | None:
    """Return the ninja that torch would start: the one on the path."""
    return _first_on_path(("ninja",))


def ninja_beside_python() -> Path | None:
    """Return the ninja in the folder of this interpreter, which is on the path only in an activated environment."""
    return _first_on_path((str(Path(sys.executable).parent / "ninja"),))


def _first_on_path(names: tuple[str, ...]) -> Path | None:
    found = (shutil.which(name) for name in names)
    return next((Path(path) for path in found if path is not None), None)


def tool_version(tool: Path) -> str | None:
    """Return the version that a tool prints under --version, None where it prints none."""
    try:
        done = subprocess.run([str(tool), "--version"], capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode("utf-8", "replace")
    for pattern in _VERSIONS:
        match = re.search(pattern, text, re.MULTILINE)
        if match is not None and done.returncode == 0:
            return match[1]
    return None


def has_header(cxx: Path, header: str, folder: str | None = None) -> bool:
    """Return whether a C++ compiler finds a header such as `libaio.h`, in its own folders or in `folder`."""
    options = ["-I", folder] if folder is not None else []
    words = [str(cxx), *options, "-E", "-x", "c++", "-o", os.devnull, "-"]
    try:
        done = subprocess.run(words, input=f"#include <{header}>\n".encode(), capture_output=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def room(folder: Path) -> tuple[Path, bool, float]:
    """Return the part of `folder` that exists, whether this process may write there, and the free space in GiB.

    Raises OSError where the file system does not answer.
    """
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return place, writable, shutil.disk_usage(place).free / _GIB
