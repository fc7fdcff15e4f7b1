"""A process that prepares a corpus for the tests of the cache: in a race, or killed at each thing that it does.

python -m tests.unit.data.prepare_worker race <corpus> <cache>     prints what it said and got as one JSON line
python -m tests.unit.data.prepare_worker crash <corpus> <cache>    prints the number of points at which it was killed
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from dist_llm.config.inputs import TokenizerConfig
from dist_llm.data.indexed import IndexedDataset
from dist_llm.data.prepare import prepare
from dist_llm.data.prepared import PreparedData
from tests.unit.data.corpora import VOCAB_SIZE, data_config, no_report

RACERS = 4
WATCHED = {"open", "os.mkdir", "os.rename"}


def race(corpus: Path, cache: Path) -> None:
    """Start when all are there and, as the one that prepares, go on only when all others wait."""
    said: list[str] = []

    def hold(line: str) -> None:
        said.append(line)
        if line.startswith("waiting"):
            meet(cache.parent / "waiting", 0)
        elif line.startswith("training"):
            meet(cache.parent / "waiting", RACERS)

    meet(cache.parent / "ready", RACERS)
    prepared = prepare(data_config(cache.parent, corpus), TokenizerConfig(), VOCAB_SIZE, hold)
    facts = {name: str(value) for name, value in asdict(prepared).items()}
    print(json.dumps({"said": said, "got": facts, "tokens": IndexedDataset(prepared.prefix).num_tokens}))


def meet(place: Path, count: int) -> None:
    """Leave a mark in `place` and wait until there are `count`."""
    place.mkdir(exist_ok=True)
    (place / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(place.iterdir())) < count:
        assert time.monotonic() < deadline, f"fewer than {count} processes came to {place.name}"
        time.sleep(0.01)


def crash(corpus: Path, cache: Path) -> None:
    """Kill a child at its first, second, ... file operation in the cache; after each, all must be well."""
    expected: PreparedData | None = None
    for point in range(1, 1000):
        child = os.fork()
        if child == 0:
            kill_at(point, cache)
            prepare_once(corpus, cache)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        published = [path for path in cache.glob("corpus-*") if path.is_dir() and ".tmp-" not in path.name]
        if published:
            # What is published is whole, whenever its builder died.
            opened = prepare_once(corpus, cache)
            assert IndexedDataset(opened.prefix).num_tokens == opened.num_tokens
        prepared = prepare_once(corpus, cache)
        assert expected in (None, prepared), (expected, prepared)
        expected = prepared
        left = sorted(path.name for path in cache.iterdir())
        assert left == [prepared.prefix.parent.name, prepared.prefix.parent.name + ".lock"], left
        shutil.rmtree(cache)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            print(point - 1)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


def kill_at(point: int, cache: Path) -> None:
    """Have this process killed just before its `point`-th opening, making or renaming in the cache."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in WATCHED and str(arguments[0]).startswith(str(cache)):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def prepare_once(corpus: Path, cache: Path) -> PreparedData:
    """Prepare in silence."""
    return prepare(data_config(cache.parent, corpus), TokenizerConfig(), VOCAB_SIZE, no_report)


if __name__ == "__main__":
    {"race": race, "crash": crash}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
