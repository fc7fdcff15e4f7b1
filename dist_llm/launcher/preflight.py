"""Is this machine fit to train a config? A list of checks, one idea each; torch is imported when the first needs it.

    ok        it is here and is what it says          missing   it is not here; the note says what brings it
    wrong     it is here and of no use; the note says why

Only a check that the config `needs` decides. Invariant: nothing of an engine's package is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_paths
from typing import Literal

import dist_llm
from dist_llm.config.checks import check, wandb_is_installed
from dist_llm.config.engine_rules import ENGINES, PACKAGES, engine_is_installed, transformer_engine_is_installed
from dist_llm.config.extensions import EXTENSIONS, find_extension
from dist_llm.config.run import RunConfig
from dist_llm.runtime import machine

PYTHONS = ((3, 11), (3, 14))
"""The first Python that runs this, and the first that no longer does."""
OLDEST_TORCH = (2, 11)
LEAST_SHARED_GIB = 1.0
"""Shared memory below which NCCL's ranks of one node fail; containers often have 64 MiB."""


@dataclass(frozen=True)
class Finding:
    """What a check found: a name, ok, missing or wrong, the version, and a note; whether the config needs it."""

    name: str
    status: Literal["ok", "missing", "wrong"]
    version: str | None = None
    note: str = ""
    needed: bool = False

    @property
    def stops(self) -> bool:
        """Whether this keeps the config from training here."""
        return self.needed and self.status != "ok"


Check = Callable[[RunConfig], Iterator[Finding]]


def examine(config: RunConfig) -> list[Finding]:
    """Return what every check finds, in the order of `CHECKS`; a check that fails is itself something wrong."""
    found: list[Finding] = []
    for run_check in CHECKS:
        try:
            found.extend(run_check(config))
        except (ImportError, OSError, RuntimeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            found.append(Finding(run_check.__name__, "wrong", note=text, needed=True))
    return found


def python(config: RunConfig) -> Iterator[Finding]:
    """Check the interpreter."""
    low, high = (".".join(str(part) for part in version) for version in PYTHONS)
    fits = PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding("python", "ok" if fits else "wrong", version, "" if fits else f"needs {low} to below {high}", True)


def torch(config: RunConfig) -> Iterator[Finding]:
    """Check torch and what it was built for."""
    version, built = machine.torch_build()
    numbers = tuple(int(part) for part in version.partition("+")[0].split(".")[:2] if part.isdecimal())
    if numbers < OLDEST_TORCH:
        oldest = ".".join(str(part) for part in OLDEST_TORCH)
        yield Finding("torch", "wrong", version, f"needs {oldest}: pip install --upgrade torch", True)
    else:
        yield Finding("torch", "ok", version, built, True)


def device(config: RunConfig) -> Iterator[Finding]:
    """Check that there is a device for each rank of this node, and list them."""
    found = machine.list_accelerators() if config.device != "cpu" else []
    for index, accelerator in enumerate(found):
        yield Finding(f"cuda:{index}", "ok", None, f"{accelerator.name}, {accelerator.memory_gib:.1f} GiB")
    nproc = config.launcher.nproc
    if config.device == "cuda" and not found:
        yield Finding("device", "missing", None, "torch sees no CUDA device: use device=cpu, or mend the driver", True)
    elif found and nproc > len(found):
        note = f"launcher.nproc={nproc} needs {nproc} CUDA devices here, one a rank: use {len(found)}, or device=cpu"
        yield Finding("device", "missing", None, note, True)
    else:
        unseen = not found and config.device == "auto" and machine.torch_build()[1] != "built for CPU"
        note = "cuda" if found else "cpu, since torch sees no CUDA device" if unseen else "cpu"
        yield Finding("device", "ok", None, note, True)


def memory(config: RunConfig) -> Iterator[Finding]:
    """Say how much memory the host has for this job."""
    yield Finding("host memory", "ok", None, f"{machine.host_memory_gib():.1f} GiB")


def cores(config: RunConfig) -> Iterator[Finding]:
    """Say how many cores this job may use, and how many threads each rank takes."""
    from dist_llm.runtime.cores import usable_cores

    usable, ranks = usable_cores(), config.launcher.nproc
    threads = config.launcher.threads if config.launcher.threads is not None else max(1, usable // ranks)
    each = f"{threads} thread{'s' if threads != 1 else ''} a rank with launcher.nproc={ranks}"
    yield Finding("cores", "ok", None, f"{usable} usable, {each}")


def backends(config: RunConfig) -> Iterator[Finding]:
    """Check that torch was built with what ranks talk through: gloo, and NCCL on CUDA."""
    built = machine.list_backends()
    cuda = config.device != "cpu" and bool(machine.list_accelerators())
    for name, needed in (("gloo", True), ("nccl", cuda)):
        there = name in built
        note = "" if there else f"torch was built without {name}"
        yield Finding(name, "ok" if there else "missing", None, note, needed)


def engines(config: RunConfig) -> Iterator[Finding]:
    """Check the package of every engine."""
    for name in ENGINES:
        label, needed = f"engine {name}", name == config.engine.name
        if name in PACKAGES:
            yield _extension(PACKAGES[name], label, needed)
        else:
            yield Finding(label, "ok", dist_llm.__version__, "part of dist_llm", needed)


def kernels(config: RunConfig) -> Iterator[Finding]:
    """Check what computes ops beside PyTorch; the library of compiled kernels is loaded."""
    from dist_llm.ops.native import native_library

    library, needed = native_library(), config.kernels.required
    if library.problem is None:
        cuda = f" and CUDA ({library.cuda})" if library.cuda else ""
        note = f"for CPU ({library.isa}){cuda}, built by {library.compiler}: {library.path}"
        yield Finding("native kernels", "ok", None, note, needed)
    else:
        yield Finding("native kernels", "missing" if library.path is None else "wrong", None, library.problem, needed)
    yield from _other_kernels(config)


def _other_kernels(config: RunConfig) -> Iterator[Finding]:
    """Check the backends of ops that are packages of others."""
    import torch

    from dist_llm.ops.backends import NATIVE, REFERENCE, TORCH
    from dist_llm.ops.registry import BACKENDS, Place, backend_problem

    place = Place("cuda" if config.device != "cpu" and machine.list_accelerators() else "cpu", torch.float32)
    for backend in dict.fromkeys(backend for row in BACKENDS.values() for backend in row):
        if backend in (REFERENCE, TORCH, NATIVE):
            continue
        ops = [op for op, row in BACKENDS.items() if backend in row]
        needed = config.kernels.required and any(getattr(config.kernels, op) == backend for op in ops)
        problem = backend_problem(ops[0], backend, place)
        status: Literal["ok", "missing"] = "ok" if problem is None else "missing"
        yield Finding(f"{backend} kernels", status, None, problem or f"for {place.device}: {', '.join(ops)}", needed)


def extensions(config: RunConfig) -> Iterator[Finding]:
    """Check the other optional packages."""
    needed = {"transformer-engine": config.engine.fp8 != "none", "wandb": config.telemetry.wandb}
    for name in EXTENSIONS:
        if name not in PACKAGES.values():
            yield _extension(name, name, needed.get(name, False))


def _extension(name: str, label: str, needed: bool) -> Finding:
    """Return what is here of an optional package."""
    found = find_extension(name)
    if found.usable:
        return Finding(label, "ok", found.version, found.place or "", needed)
    status: Literal["missing", "wrong"] = "missing" if found.problem is None else "wrong"
    return Finding(label, status, found.version, found.problem or found.install, needed)


def compilers(config: RunConfig) -> Iterator[Finding]:
    """Check what builds kernels when they are first used: a C++ compiler, ninja, nvcc, the headers of libaio."""
    files = config.engine.name == "deepspeed" and config.engine.offload_to == "nvme"
    cxx = machine.find_cxx()
    yield _tool("C++ compiler", cxx, "DeepSpeed's CPU Adam: put g++ or clang++ on the path, or name it in CXX", files)
    ninja, beside = machine.find_ninja(), machine.ninja_beside_python()
    if ninja is None and beside is not None:
        note = f"{beside} is not on the path, where torch looks for it: activate the environment"
        yield Finding("ninja", "missing", machine.tool_version(beside), note, files)
    else:
        yield _tool("ninja", ninja, "DeepSpeed's CPU Adam: pip install ninja", files)
    yield _tool(
        "nvcc", machine.find_nvcc(), "DeepSpeed's fused Adam and NVIDIA's apex: install the CUDA toolkit", False
    )
    there = cxx is not None and machine.has_header(cxx, "libaio.h")
    note = "" if there else "builds DeepSpeed's files on NVMe: install libaio-dev (Debian) or libaio-devel (Red Hat)"
    yield Finding("libaio", "ok" if there else "missing", None, note, files)


def _tool(name: str, tool: Path | None, builds: str, needed: bool) -> Finding:
    if tool is None:
        return Finding(name, "missing", None, f"builds {builds}", needed)
    return Finding(name, "ok", machine.tool_version(tool), str(tool), needed)


def inductor(config: RunConfig) -> Iterator[Finding]:
    """Check that torch.compile's inductor can build kernels: on CPU with a C++ compiler, on CUDA with Triton."""
    needed = config.parallel.compile and config.parallel.compile_backend == "inductor"
    cxx, note = machine.find_cxx(), ""
    if config.device != "cpu" and machine.list_accelerators():
        by = "Triton"
        if find_spec("triton") is None:
            note = "has no Triton: pip install triton"
    else:
        by = str(cxx)
        if cxx is None:
            note = "has no C++ compiler: put g++ or clang++ on the path, or name it in CXX"
        elif not machine.has_header(cxx, "Python.h", get_paths()["include"]):
            note = "has no Python.h: install the headers of this Python (Debian: python3-dev)"
    if note:
        yield Finding("inductor", "missing", None, f"{note}; or use parallel.compile_backend=aot_eager", needed)
    else:
        yield Finding("inductor", "ok", None, f"builds kernels by {by}", needed)


def disk(config: RunConfig) -> Iterator[Finding]:
    """Check that the run's folder can be written, and how much room there is."""
    place, writable, free = machine.room(config.run.folder)
    if writable:
        yield Finding("run.dir", "ok", None, f"{place}: {free:.1f} GiB free", True)
    else:
        yield Finding("run.dir", "wrong", None, f"{place} cannot be written: use another run.dir", True)
    if config.engine.offload_to == "nvme" and config.engine.nvme_path is not None:
        place, writable, free = machine.room(Path(config.engine.nvme_path))
        note = f"{place}: {free:.1f} GiB free" if writable else f"{place} cannot be written: use another folder"
        yield Finding("engine.nvme_path", "ok" if writable else "wrong", None, note, True)


def shared_memory(config: RunConfig) -> Iterator[Finding]:
    """Check that NCCL's ranks of one node have room to share memory."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    _, writable, free = machine.room(place)
    note = f"{free:.1f} GiB free"
    if writable and free >= LEAST_SHARED_GIB:
        yield Finding("shared memory", "ok", None, note)
    else:
        yield Finding("shared memory", "wrong", None, f"{note}: NCCL may fail; give the container a larger --shm-size")


def settings(config: RunConfig) -> Iterator[Finding]:
    """Check the rules between settings; those about packages have lines of their own."""
    packages = (engine_is_installed, transformer_engine_is_installed, wandb_is_installed)
    elsewhere = {slip.words for rule in packages for slip in rule(config, None)}
    broken = [violation for violation in check(config, None) if violation.rule not in elsewhere]
    for violation in broken:
        yield Finding("config", "wrong", None, str(violation), True)
    if not broken:
        yield Finding("config", "ok", None, "breaks no rule", True)


CHECKS: tuple[Check, ...] = (
    python,
    torch,
    device,
    memory,
    cores,
    backends,
    engines,
    kernels,
    extensions,
    compilers,
    inductor,
    disk,
    shared_memory,
    settings,
)
"""The checks, in the order in which their findings are shown."""
