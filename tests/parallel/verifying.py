"""What tests of `verify` share: a tiny run on a text corpus, and the pool's ranks lent where it would start its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from dist_llm.runtime.seed import set_determinism
from tests.parallel.tiny import tiny_config

TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * 7919 % 1000} lazy dogs\n" for n in range(3000))


def corpus_config(folder: Path) -> RunConfig:
    """Return a tiny run on a text corpus; two layers a pipeline stage, so that interleaving is legal."""
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    data = {"path": str(folder / "corpus.txt"), "cache_dir": str(folder / "cache"), "microbatch": 2}
    run = {"run": {"steps": 40, "seed": 1}, "schedule": {"name": "cosine", "warmup_steps": 20}}
    return tiny_config({}, {"vocab_size": 300}, data, launcher={"nproc": 1}, **run)


@contextmanager
def lending(pool: WorkerPool, *modules: ModuleType) -> Iterator[None]:
    """Let modules that start a WorkerPool use the ranks that are there; they come back as they were."""

    def lent(size: int, timeout_seconds: float) -> AbstractContextManager[WorkerPool]:
        return nullcontext(pool) if size <= pool.size else WorkerPool(size, timeout_seconds=300.0)

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "WorkerPool", lent)
        yield
    pool.run(set_determinism, 0, False, world=pool.size)
