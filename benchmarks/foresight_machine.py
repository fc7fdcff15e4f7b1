"""A hardware file from five runs on this machine, and what it foretells of ten others: step time and live bytes.

    python -m benchmarks.foresight_machine [FOLDER] [--rounds N] [--json]

Runs of one to four ranks train for 24 steps each on an otherwise idle CPU, all of them in each of four rounds (about
twenty minutes): what else a machine does lengthens a step, so a run's time is the fastest step of all rounds, of what
is fitted and of what is foretold alike. Those in FOLDER are not run again. Live bytes are all that a rank's tensors
hold at most in a step, counted at every operation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dist_llm.config.decode import decode
from dist_llm.config.document import read_document
from dist_llm.config.run import RunConfig
from dist_llm.engine.native import NativeEngine
from dist_llm.planner.footprint import predict_memory
from dist_llm.runtime.mesh import build_mesh
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.bench_step import random_batch

COMMON = (
    "run.steps=24 run.resume=never model=llama-tiny model.vocab_size=1024 model.num_heads=4 model.num_kv_heads=4 "
    "model.max_seq_len=512 data.max_corpus_mib=4 telemetry.tensorboard=false telemetry.picture=false "
    "checkpoint.interval=0"
)


@dataclass(frozen=True)
class Run:
    """A run: width, feed-forward width, layers, sequence length, batch, microbatch, and overrides of its layout."""

    name: str
    sizes: tuple[int, int, int, int, int, int]
    layout: str = ""

    @property
    def words(self) -> list[str]:
        """The run as overrides."""
        keys = ("model.hidden_size", "model.ffn_hidden_size", "model.num_layers")
        keys += ("data.seq_len", "data.global_batch", "data.microbatch")
        sizes = [f"{key}={size}" for key, size in zip(keys, self.sizes, strict=True)]
        return [*COMMON.split(), f"run.name={self.name}", *sizes, *self.layout.split()]


FITTED = (
    Run("wide", (384, 1024, 4, 256, 8, 4)),
    Run("narrow", (64, 192, 12, 128, 8, 2)),
    Run("data", (256, 768, 4, 256, 8, 2), "launcher.nproc=2"),
    Run("tensor", (256, 768, 4, 256, 8, 4), "launcher.nproc=2 parallel.tensor=2 parallel.sequence=true"),
    Run("pipeline", (128, 384, 6, 512, 8, 4), "launcher.nproc=2 parallel.pipeline=2"),
)
UNSEEN = (
    Run("wider", (512, 1408, 3, 256, 4, 4)),
    Run("deeper", (192, 512, 8, 256, 8, 4)),
    Run("shorter", (128, 384, 4, 128, 16, 4)),
    Run("data-short", (256, 768, 6, 128, 8, 4), "launcher.nproc=2"),
    Run("zero-3", (384, 1024, 2, 256, 8, 2), "launcher.nproc=2 parallel.zero=3"),
    Run("tensor-narrow", (192, 512, 4, 256, 8, 4), "launcher.nproc=2 parallel.tensor=2"),
    Run("pipeline-wide", (256, 768, 4, 256, 8, 2), "launcher.nproc=2 parallel.pipeline=2"),
    Run("recompute", (256, 768, 4, 256, 8, 4), "parallel.recompute=full"),
    Run("four-ranks", (128, 384, 8, 256, 8, 4), "launcher.nproc=4 parallel.tensor=2 parallel.sequence=true"),
    Run("data-long", (320, 896, 4, 512, 4, 2), "launcher.nproc=2"),
)


class _LiveBytes(TorchDispatchMode):
    """Adds up, after every operation, the storages that operations have touched and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                storage = (leaf.to_local() if isinstance(leaf, DTensor) else leaf).untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        alive = {key: ref() for key, ref in self._storages.items()}
        self._storages = {key: ref for key, ref in self._storages.items() if alive[key] is not None}
        self.most = max(self.most, sum(storage.nbytes() for storage in alive.values() if storage is not None))
        return out


def live_bytes(config: RunConfig) -> tuple[int, int]:
    """Train two steps on this rank; return its pipeline rank and the most bytes that lived in the second."""
    with _LiveBytes() as log:
        engine = NativeEngine(config, build_mesh(config.parallel, torch.device("cpu")))
        for step in range(2):
            log.most = 0
            engine.train_step(random_batch(config, engine.data_slice, step))
        engine.close()
    return engine._mesh.pp.index, log.most


def memory_error(pool: WorkerPool, config: RunConfig) -> float:
    """Return the foretold bytes of the fullest pipeline rank over those that it held, less one."""
    ranks = config.launcher.nproc
    held: dict[int, int] = {}
    for index, most in pool.run(live_bytes, config, world=ranks):
        held[index] = max(most, held.get(index, 0))
    foretold = [rank.allocated_bytes for rank in predict_memory(config, ranks).ranks]
    return max(foretold) / max(held.values()) - 1


def _train(folder: Path, run: Run) -> Path:
    """Train a run in a folder as a user does, unless it has been; return its own folder."""
    place = folder / run.name
    if not (place / "report.html").is_file():
        words = [sys.executable, "-m", "dist_llm", "launch", f"run.dir={folder}", *run.words]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return place


def main() -> None:
    """Train, calibrate, foretell, and print how far off each is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs are, or go (a temporary folder)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="how often each run is run (4)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="foresight-"))
    rounds = [[_train(folder / f"round{i}", run) for run in (*FITTED, *UNSEEN)] for i in range(arguments.rounds)]
    fitted = [place for places in rounds for place in places[: len(FITTED)]]
    unseen = [place for places in rounds for place in places[len(FITTED) :]]
    words = [sys.executable, "-m", "dist_llm", "plan", "calibrate", *map(str, fitted), "--json"]
    words += ["--write", str(folder / "machine.yaml"), "--hold-out", *map(str, unseen)]
    answer = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    times = {Path(row["name"]).name: row["error"] for row in answer["held_out"]}
    with WorkerPool(4) as pool:
        configs = {run.name: decode(read_document(folder / "round0" / run.name / "config.yaml")) for run in UNSEEN}
        memory = {name: memory_error(pool, config) for name, config in configs.items()}
    if arguments.json:
        print(json.dumps({"step_seconds": times, "live_bytes": memory}))
        return
    for name, error in times.items():
        print(f"{name:<16} step time {error:+7.1%}   peak live bytes {memory[name]:+7.1%}")
    print(f"mean of {len(times)}: step time {mean(map(abs, times.values())):.1%}", end="")
    print(f" (bound 15 %), live bytes {mean(map(abs, memory.values())):.1%} (bound 5 %)")


if __name__ == "__main__":
    main()
