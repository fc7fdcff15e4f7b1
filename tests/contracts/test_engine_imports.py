"""Nothing of DeepSpeed or Megatron-Core is imported unless its engine is chosen, by a file or by a command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.contracts.interpreter import run_command
from tests.contracts.source import ROOT, Source, imported_modules, python_sources

OWNERS = {
    "deepspeed": ("dist_llm/engine/deepspeed",),
    "megatron": ("dist_llm/engine/megatron",),
    "transformer_engine": ("dist_llm/engine/megatron", "dist_llm/ops/transformer_engine.py"),
    "apex": ("dist_llm/engine/megatron", "dist_llm/ops/apex.py"),
}
"""Beginnings of the names of files that may import a package, and only they."""

TINY = (
    "model=llama-tiny model.num_layers=1 model.hidden_size=32 model.ffn_hidden_size=64 model.vocab_size=384 "
    "model.max_seq_len=32 data.seq_len=32 data.global_batch=4 data.microbatch=4 run.steps=1 device=cpu "
    "telemetry.picture=false telemetry.tensorboard=false"
).split()


def foreign_imports(sources: Iterable[Source]) -> Iterator[str]:
    """Find imports of an engine's packages, at whatever depth, outside the engine's own files."""
    for source in sources:
        for node, module in imported_modules(source.tree):
            owners = OWNERS.get(module.partition(".")[0])
            if owners is not None and not source.path.startswith(owners):
                yield source.at(node, f"{module} belongs to {owners[0]}")


def _loaded(words: list[str], packages: Iterable[str] = OWNERS) -> list[str]:
    """Run a command in an interpreter of its own; return which of the packages it loaded."""
    done = run_command(words)
    assert done.code == 0, done.text
    return sorted({name.partition(".")[0] for name in done.loaded} & set(packages))


def test_only_an_engine_imports_its_package() -> None:
    findings = list(foreign_imports(python_sources("dist_llm")))
    assert not findings, "\n".join(findings)


def test_foreign_imports_is_seen() -> None:
    nested = "def f():\n    from megatron.core import parallel_state\n"
    assert list(foreign_imports([Source("dist_llm/engine/native.py", "import deepspeed\n")]))
    assert list(foreign_imports([Source("dist_llm/engine/build.py", nested)]))
    assert not list(foreign_imports([Source("dist_llm/engine/megatron_model.py", nested)]))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["plan", "layouts", "--ranks", "4"],
        ["plan", "layouts", "--ranks", "4", "engine=deepspeed"],
        ["train", "--cfg", "engine=megatron"],
        ["doctor", "device=cpu"],
        ["doctor", "--json", "engine=megatron", "device=cpu"],
    ],
    ids=" ".join,
)
def test_command_loads_no_engine(words: list[str]) -> None:
    assert _loaded(words) == []


def test_native_training_loads_no_other_engine(tmp_path: Path) -> None:
    corpus = ROOT / "tests" / "golden" / "corpus.txt"
    places = [f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path}"]
    assert _loaded(["train", *TINY, *places]) == []
    assert (tmp_path / "default" / "metrics.jsonl").is_file()


def test_loaded_is_seen() -> None:
    assert _loaded(["train", "--cfg"], ["hydra", "megatron"]) == ["hydra"]
