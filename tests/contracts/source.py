"""The repository as text: which files it has, and Python names resolved through imports.

Every contract is a pure function from such text to findings `path:line: what is wrong`, so that each has a test that
feeds it a bad example and sees it fail.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dist_llm"
_UNTRACKED = {".git", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".import_linter_cache", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the repository (with slashes) and its text."""

    path: str
    text: str

    @property
    def layer(self) -> str:
        """First name below the package (`runtime`, `types`), or the empty string outside of it."""
        parts = PurePosixPath(self.path).parts
        return parts[1].removesuffix(".py") if len(parts) > 1 and parts[0] == PACKAGE else ""

    @property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return _parse(self.path, self.text)

    def at(self, node: ast.AST, message: str) -> str:
        """Say a finding as `path:line: message`."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


@cache
def _parse(path: str, text: str) -> ast.Module:
    return ast.parse(text, filename=path)


@cache
def repository_files() -> tuple[str, ...]:
    """List the files that git tracks or would track, relative to the repository, sorted."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0:
        names = {name.decode() for name in listing.stdout.split(b"\0") if name}
    else:  # a source archive: no git history to ask
        names = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
        names = {name for name in names if not _UNTRACKED & set(PurePosixPath(name).parts)}
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))


@cache
def python_sources(*folders: str) -> tuple[Source, ...]:
    """Read every Python file of the repository, or of the named top folders only."""
    names = [name for name in repository_files() if name.endswith(".py")]
    if folders:
        names = [name for name in names if PurePosixPath(name).parts[0] in folders]
    return tuple(Source(name, (ROOT / name).read_text(encoding="utf-8")) for name in names)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


class Names:
    """What local names mean: under `import torch.distributed as dist`, `dist.send` is `torch.distributed.send`."""

    def __init__(self, tree: ast.Module) -> None:
        self.imports: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    self.imports[local] = alias.name if alias.asname else local
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def dotted(self, node: ast.AST) -> str | None:
        """Resolve a name or attribute chain to its full dotted name; None for anything else."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return None


def imported_modules(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield (node, dotted name) of every import, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def within(name: str, parent: str) -> bool:
    """Say whether the dotted name is `parent` or something inside it."""
    return name == parent or name.startswith(parent + ".")
