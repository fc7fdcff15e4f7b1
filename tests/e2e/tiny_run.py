"""A run of a tiny Llama on a made-up text, as a user starts it: its words, its processes and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
PATIENCE_SECONDS = 240.0
"""How long any one command may take, however busy the machine is."""

FOUR_RANKS = (
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "parallel.sequence=true",
    "parallel.zero=1",
    "launcher.nproc=4",
)
TWO_RANKS = ("parallel.tensor=2", "launcher.nproc=2")
ONE_RANK = ("parallel.tensor=1", "parallel.pipeline=1", "launcher.nproc=1")
QUIET = ("telemetry.picture=false", "telemetry.tensorboard=false", "telemetry.sample_tokens=0")


@dataclass(frozen=True)
class Place:
    """A folder of a test: its corpus, its cache of prepared tokens and its runs."""

    folder: Path

    @property
    def runs(self) -> Path:
        """Where `run.dir` points."""
        return self.folder / "runs"

    def words(self, name: str, *overrides: str) -> list[str]:
        """Return the overrides of a tiny run called `name`; `overrides` come last, so they win."""
        return [
            "model=llama-tiny",
            "model.num_layers=2",
            "model.hidden_size=32",
            "model.ffn_hidden_size=64",
            "model.vocab_size=384",
            "model.max_seq_len=32",
            f"data.path={self.folder / 'corpus.txt'}",
            f"data.cache_dir={self.folder / 'cache'}",
            "data.seq_len=32",
            "data.global_batch=8",
            "data.microbatch=2",
            "optimizer.lr=2e-3",
            "checkpoint.interval=10",
            "checkpoint.keep=9",
            "launcher.threads=1",
            "device=cpu",
            f"run.dir={self.runs}",
            f"run.name={name}",
            f"run.steps={STEPS}",
            *overrides,
        ]


def write_corpus(path: Path) -> None:
    """Write about 90 kB of sentences from 150 made-up words, some far more frequent than others."""
    draw = random.Random(7)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 8))) for _ in range(150)]
    lines = [" ".join(words[draw.randrange(1 + draw.randrange(len(words)))] for _ in range(12)) for _ in range(1500)]
    path.write_text("\n".join(lines))


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a user who has this checkout and no launcher above."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return {**kept, "PYTHONPATH": str(ROOT), **extra}


def start(words: Sequence[str], log: Path, module: str = "dist_llm") -> subprocess.Popen[bytes]:
    """Start `python -m module words`; stdout and stderr go to the file `log`, so that no pipe can fill up."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", module, *words]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment(), cwd=log.parent)


def run(words: Sequence[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `dist-llm words` to its end."""
    command = [sys.executable, "-m", "dist_llm", *words]
    env = env if env is not None else environment()
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=cwd, timeout=PATIENCE_SECONDS, check=False
    )


def lines(path: Path) -> list[dict[str, object]]:
    """Return the objects of a JSONL file, none where it is not there yet; a line that is being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def curve(run_dir: Path) -> dict[int, tuple[object, object]]:
    """Return loss and gradient norm of each step, of a repeated step the last."""
    return {int(str(line["step"])): (line["loss"], line["grad_norm"]) for line in lines(run_dir / "metrics.jsonl")}


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Return once `step` is in metrics.jsonl; fail when the run ends before."""

    def reached() -> bool:
        assert process.poll() is None, f"the run ended with {process.returncode} before step {step}"
        return len(lines(run_dir / "metrics.jsonl")) >= step

    wait_until(reached, f"step {step}")


def wait_until(true: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Return once `true()`; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.01)


def ranks_below(launcher: int) -> dict[int, int]:
    """Return rank -> process id of the ranks that a launcher started, by the RANK in their environment."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(part.split("=", 1) for part in (entry / "environ").read_text().split("\0") if "=" in part)
        except (OSError, UnicodeDecodeError):
            continue
        if parent == launcher and "RANK" in variables:
            found[int(variables["RANK"])] = int(entry.name)
    return found


def alive(pid: int) -> bool:
    """Say whether a process still runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that a failed test left behind; its ranks go with it."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()


def snapshot(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoint_tensors(checkpoint: Path) -> dict[str, bytes]:
    """Return every saved rectangle of a checkpoint as bytes, by rank file and name."""
    from safetensors.numpy import load_file

    return {
        f"{file.name}/{name}": tensor.tobytes()
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
