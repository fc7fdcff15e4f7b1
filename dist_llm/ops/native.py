"""The compiled library of kernels: found, checked and loaded once a process; a library of no use is named, not fatal.

Its build leaves `_C.json` beside it, with its checksum or with why nothing was built: a damaged file could end the
process that loads it, so it is compared first. `kernels/` has the sources.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

LIBRARY, FACTS = "_C.abi3.so", "_C.json"
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps dist_llm, or `make setup`"
"""What builds the library against the torch that is here."""


@dataclass(frozen=True)
class NativeLibrary:
    """What is here of the library; problem: why it is of no use, None where it is loaded.

    isa: the instruction set that its CPU loops use. compiler, cuda: what built it, the architectures of its GPU code.
    """

    problem: str | None
    path: Path | None = None
    isa: str = ""
    compiler: str = ""
    cuda: str = ""


@cache
def native_library() -> NativeLibrary:
    """Load the library of this installation, at the first call, and return what it is. Raises nothing."""
    return open_library(Path(__file__).parent)


def open_library(folder: Path) -> NativeLibrary:
    """Load the library of a folder, and return what it is."""
    path = folder / LIBRARY
    if not path.is_file() and not (folder / FACTS).is_file():
        return NativeLibrary(f"none is installed: {REBUILD}")
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if not facts["built"]:
            return NativeLibrary(f"there was {facts['reason']}: {REBUILD}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
            return NativeLibrary(f"{path} is damaged (its checksum is another than {FACTS} has): {REBUILD}", path)
        built, cuda = str(facts["compiler"]), str(facts["cuda"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return NativeLibrary(f"{path.parent} holds no whole build ({type(error).__name__}: {error}): {REBUILD}", path)
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        isa = str(torch.ops.dist_llm.cpu_isa())
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        return NativeLibrary(f"torch {torch.__version__} cannot load {path} ({reason}): {REBUILD}", path)
    return NativeLibrary(None, path, isa, built, cuda)


def missing_ops(names: Iterable[str]) -> list[str]:
    """Return which of the names the loaded library does not define: it may be of another version."""
    return [name for name in names if not hasattr(torch.ops.dist_llm, name)]
