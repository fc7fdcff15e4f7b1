"""`dist-llm checkpoint`: what a run's checkpoints hold, and whether they are sound."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from dist_llm.cli.parse import Answer, Command, add_json
from dist_llm.errors import CheckpointError, ExitCode, StorageError


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a run folder."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder, or its checkpoints/")
    add_json(parser)


def list_all(arguments: argparse.Namespace) -> Answer:
    """List the committed checkpoints of a run, newest first."""
    from dist_llm.checkpoint.inspect import list_checkpoints

    root = _checkpoints_of(arguments.run_dir)
    rows = list_checkpoints(root)
    lines = [_row(row) for row in rows] or [f"{root}: no checkpoint"]
    return Answer("\n".join(lines), {"root": str(root), "checkpoints": rows})


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a checkpoint."""
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run folder for its newest one")
    add_json(parser)


def inspect(arguments: argparse.Namespace) -> Answer:
    """Describe what a checkpoint holds."""
    from dist_llm.checkpoint.inspect import describe

    facts = describe(_checkpoint_at(arguments.path))
    return Answer(_describe(facts), facts)


def verify(arguments: argparse.Namespace) -> Answer:
    """Read a whole checkpoint and compare every checksum."""
    from dist_llm.checkpoint.inspect import verify as find_damage

    path = _checkpoint_at(arguments.path)
    problems = find_damage(path)
    lines = [f"{path}: {'damaged' if problems else 'sound'}", *(f"  {problem}" for problem in problems)]
    code = ExitCode.BAD_DATA if problems else ExitCode.DONE
    return Answer("\n".join(lines), {"ok": not problems, "path": str(path), "problems": problems}, code)


def _checkpoints_of(path: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not root.is_dir():
        raise StorageError(f"{path}: no such run folder")
    return root


def _checkpoint_at(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest committed one of the run at `path`."""
    if not path.is_dir():
        raise StorageError(f"{path}: no such checkpoint or run folder")
    if (path / "manifest.json").exists():
        return path
    from dist_llm.checkpoint.inspect import list_checkpoints

    rows = list_checkpoints(_checkpoints_of(path))
    if not rows:
        raise CheckpointError(f"{path} is no checkpoint and holds none")
    return Path(str(rows[0]["path"]))


def _row(row: Mapping[str, object]) -> str:
    """Return one line on a checkpoint."""
    if row["problem"] is not None:
        return f"{row['path']}  damaged: {row['problem']}"
    size = f"{row['tensors']} tensors  {_mib(row['bytes'])}"
    return f"{row['path']}  step {row['step']}  {size}  written by {row['ranks']} ranks"


def _describe(facts: Mapping[str, object]) -> str:
    """Return what a checkpoint holds: its values, then a line for each tensor."""
    lines = [f"{name}: {value}" for name, value in facts.items() if name not in ("tensors", "files", "facts")]
    for name in ("facts", "files"):
        held = facts.get(name)
        if isinstance(held, Mapping):
            lines += [f"{name}:", *(f"  {key}: {value}" for key, value in held.items())]
    tensors = facts.get("tensors")
    if isinstance(tensors, Mapping):
        lines.append(f"tensors: {len(tensors)}")
        lines += [f"  {name}  {held['dtype']} {held['shape']}  {_mib(held['bytes'])}" for name, held in tensors.items()]
    return "\n".join(lines)


def _mib(count: object) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / 2**20:.2f} MiB" if isinstance(count, int) else "unknown size"


COMMANDS = {
    "list": Command("the committed checkpoints of a run", add_list_arguments, list_all),
    "inspect": Command("what a checkpoint holds", add_path_arguments, inspect),
    "verify": Command("read a checkpoint and compare every checksum", add_path_arguments, verify),
}
