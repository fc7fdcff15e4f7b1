"""Optional packages: which are here, of which version, and whether they are what their name says. Imports none of them.

A name on the path proves little. `apex` and `megatron` on PyPI are unrelated to NVIDIA's; to Python any folder on the
path is a package, be it only a `wandb/` full of runs. So each row of the table names files that the real one has.
Invariant: only the topmost package is asked for, since asking for a submodule imports its parent; the rest is files.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class Known:
    """A package that can be used if it is here: what pip and Python call it, and by what the real one is known.

    marks are files of the real one, any of which will do; compiled are extension modules without their suffix, any of
    which will do, none meaning that it needs none. Both are relative to the package's folder. oldest is the first
    version that serves. What brings it is an extra of ours, or a command.
    """

    name: str
    module: str
    title: str
    marks: tuple[str, ...]
    compiled: tuple[str, ...] = ()
    extra: str = ""
    command: str = ""
    oldest: tuple[int, ...] = ()

    @property
    def install(self) -> str:
        """The command that installs the real one."""
        return self.command or f"pip install 'dist-llm[{self.extra}]'"


@dataclass(frozen=True)
class Extension:
    """What is here under the name of an optional package.

    place is None where there is nothing; problem says why what lies there is of no use; version is None where no
    metadata belongs to it; install is the command that brings the real one.
    """

    name: str
    version: str | None
    place: str | None
    problem: str | None
    install: str

    @property
    def usable(self) -> bool:
        """Whether the real one is here, with the compiled parts that it needs."""
        return self.place is not None and self.problem is None


_TORCH_PART = "transformer_engine_torch"
_ROWS = (
    Known("deepspeed", "deepspeed", "DeepSpeed", ("runtime/engine.py",), extra="deepspeed", oldest=(0, 19)),
    Known("megatron-core", "megatron.core", "Megatron-Core", ("parallel_state.py",), extra="megatron", oldest=(0, 16)),
    Known(
        "transformer-engine",
        "transformer_engine",
        "Transformer Engine",
        ("pytorch/__init__.py",),
        (_TORCH_PART, f"wheel_lib/{_TORCH_PART}", f"../{_TORCH_PART}"),
        command="pip install --no-build-isolation 'transformer-engine[pytorch]'",
    ),
    Known(
        "apex",
        "apex",
        "NVIDIA's apex",
        ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py"),
        ("../amp_C",),
        command="APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex",
    ),
    Known(
        "flash-attn",
        "flash_attn",
        "flash attention",
        ("flash_attn_interface.py",),
        command="pip install --no-build-isolation flash-attn",
    ),
    Known("mpi4py", "mpi4py", "mpi4py", ("run.py",), ("MPI", "MPI.openmpi", "MPI.mpich"), extra="mpi"),
    Known("triton", "triton", "Triton", ("runtime/jit.py",), ("_C/libtriton",), extra="triton", oldest=(3, 7, 1)),
    Known("wandb", "wandb", "Weights & Biases", ("sdk/wandb_run.py",), extra="wandb"),
    Known("datatrove", "datatrove", "datatrove", ("pipeline/base.py",), extra="data"),
    Known("lm-eval", "lm_eval", "lm-evaluation-harness", ("evaluator.py",), extra="eval"),
)
EXTENSIONS: Mapping[str, Known] = MappingProxyType({row.name: row for row in _ROWS})
"""The table, by what pip calls each."""


def find_extension(name: str) -> Extension:
    """Return what is here of an optional package, by the name that pip, Python or our extras know it by.

    Imports nothing; takes a millisecond, and is remembered until the path changes. Raises KeyError for an unknown name.
    """
    plain = re.sub(r"[-_.]+", "-", name.lower())
    for row in _ROWS:
        if plain in (row.name, row.module.replace("_", "-").replace(".", "-"), row.extra):
            return _find(row, tuple(sys.path))
    raise KeyError(name)


@lru_cache(maxsize=256)
def _find(row: Known, path: tuple[str, ...]) -> Extension:
    """Look for one package on the present path."""
    top, _, inner = row.module.partition(".")
    folders, regular = _package(top)
    if not folders:
        return Extension(row.name, None, None, None, row.install)
    place = next((folder / inner for folder in folders if _is_package(folder / inner)), folders[0])
    problem = None
    if inner and regular:
        problem = f"{_text(folders[0])} is not of {row.title} (which has no __init__.py there)"
    elif not any((place / mark).is_file() for mark in row.marks):
        missing = Path(row.marks[0]) if place.name == inner or not inner else Path(inner, row.marks[0])
        kind = "" if regular else "only a folder of that name, "
        problem = f"{_text(place)} is {kind}not {row.title} (it has no {missing})"
    if problem is not None:
        return Extension(row.name, None, str(place), f"{problem}: {_cure(row, top, folders[0], regular)}", row.install)
    version = _version(row, folders)
    if row.compiled and not any(_is_compiled(place / part) for part in row.compiled):
        part = Path(row.compiled[0]).name
        problem = f"{_text(place)} is {row.title} without its compiled part {part}: {row.install}"
    elif version is not None and _numbers(version) < row.oldest:
        oldest = ".".join(str(number) for number in row.oldest)
        problem = f"{_text(place)} is {row.title} {version}, older than {oldest}: {row.install}"
    return Extension(row.name, version, str(place), problem, row.install)


def _package(top: str) -> tuple[tuple[Path, ...], bool]:
    """Return where a topmost package or module lies, and whether it is a regular one: no namespace of bare folders."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        # Something on the path refuses the name, or a module without a spec stands in for it.
        return (), False
    if spec is None:
        return (), False
    regular = spec.has_location and spec.origin is not None
    if spec.submodule_search_locations is not None:
        return tuple(Path(folder) for folder in spec.submodule_search_locations), regular
    return ((Path(spec.origin),) if spec.origin is not None else ()), regular


def _is_package(folder: Path) -> bool:
    return (folder / "__init__.py").is_file()


def _is_compiled(stem: Path) -> bool:
    """Whether an extension module of this interpreter lies there."""
    return any(stem.with_name(stem.name + suffix).is_file() for suffix in EXTENSION_SUFFIXES)


def _cure(row: Known, top: str, folder: Path, regular: bool) -> str:
    """Return what to type, or to move, so that the real one is found."""
    if not regular:
        return row.install
    found = _distribution(top)
    if found is not None and _holds(found, folder):
        return f"pip uninstall {top}; {row.install}"
    return f"move {_text(folder)} out of the way; {row.install}"


def _version(row: Known, folders: tuple[Path, ...]) -> str | None:
    """Return the version that the metadata of the package says, None where there is none or it is of another copy."""
    found = _distribution(row.name)
    if found is None or not (_is_editable(found) or any(_holds(found, folder) for folder in folders)):
        return None
    try:
        versions = found.metadata.get_all("Version")
    except (PackageNotFoundError, OSError, TypeError, ValueError):
        # Its folder is there, but empty or damaged; Python versions say so in different ways.
        return None
    return str(versions[0]) if versions else None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, such as (0, 16, 1)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match is not None else ()


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except (PackageNotFoundError, OSError, ValueError):
        return None


def _holds(found: Distribution, folder: Path) -> bool:
    """Whether a distribution's files lie where the package was found."""
    root = found.locate_file("")
    return Path(str(root)).resolve() == folder.resolve().parent


def _is_editable(found: Distribution) -> bool:
    """Whether a distribution was installed as a link to its source, wherever that lies."""
    try:
        facts = json.loads(found.read_text("direct_url.json") or "{}")
        return bool(facts.get("dir_info", {}).get("editable"))
    except (OSError, ValueError, AttributeError):
        return False


def _text(place: Path) -> str:
    """Spell a path on one line."""
    text = str(place)
    return text if text.isprintable() else ascii(text)[1:-1]
