"""Small corpora and settings that the data tests share."""

from __future__ import annotations

from pathlib import Path

from dist_llm.config.inputs import DataConfig

REPOSITORY = Path(__file__).parents[3]
VOCAB_SIZE = 320
NAMES = "loss norm rank shard step token batch layer".split()


def source_text(number: int, lines: int = 40) -> str:
    """Return a made-up source file, another for each number, with tabs, indentation and a character beyond ASCII."""
    parts = [f'"""Module {number}: naïve text."""\n']
    for line in range(lines):
        name = NAMES[(number * 7 + line * line) % len(NAMES)]
        other = NAMES[(number + line) % len(NAMES)]
        parts.append(f"def {name}_{line}({other}):\n\treturn {other} + {number * line}\n\n")
    return "".join(parts)


def write_folder(root: Path, count: int = 6) -> Path:
    """Write `count` source files in nested folders and return the folder."""
    for number in range(count):
        folder = root / f"part{number % 2}" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{number}.py").write_bytes(source_text(number).encode())
    return root


def data_config(tmp_path: Path, path: Path | str, **settings: object) -> DataConfig:
    """Return a data section that reads `path` and caches under tmp_path."""
    values: dict[str, object] = {
        "path": str(path),
        "cache_dir": str(tmp_path / "cache"),
        "seq_len": 16,
        "global_batch": 8,
        "microbatch": 1,
    }
    return DataConfig.model_validate(values | settings)


def no_report(line: str) -> None:
    """Take a line of progress and keep silent."""
    del line
