"""A ladder of small runs on real text, the law that fits them, and the loss of a larger run that it foretells.

    python benchmarks/foresight_ladder.py [FOLDER] [--jobs N]

The text is the source of the installed torch (64 MiB of Python and C++), read once at most. Twelve runs are fitted, and
one of more than four times the compute of the largest is predicted: half an hour on two cores. Runs that FOLDER holds
finished are not trained again. Sequences are short: in longer ones models so small learn at some step to copy from the
context, which is a jump and no power law.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BUDGETS, RUNS = "1.5e12:1.27e13", 12
HELD_OUT = "5.5e13"
COMMON = (
    "model=llama-tiny model.vocab_size=512 model.max_seq_len=64 data.seq_len=64 data.microbatch=16 "
    "data.global_batch=16 data.max_corpus_mib=64 data.validation_fraction=0.005 "
    "telemetry.tensorboard=false telemetry.picture=false checkpoint.interval=0"
)


def _ask(*words: object) -> dict[str, object]:
    """Return what a command answers as JSON."""
    line = [sys.executable, "-m", "dist_llm", *map(str, words), "--json"]
    found: dict[str, object] = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def _corpus(words: list[str]) -> list[str]:
    """Tokenize the text once, so that files which change beside it do not matter; return the runs' overrides."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.submodule_search_locations is not None
    found = _ask("data", "prepare", *words, f"data.path={torch.submodule_search_locations[0]}")
    tokenizer = Path(str(found["tokenizer_path"]))
    return [*words, f"data.path={tokenizer.parent / 'tokens'}", f"tokenizer.path={tokenizer}"]


def _train(config: str) -> None:
    """Train a run as a user does; what it says goes beside its config."""
    with Path(config).with_suffix(".log").open("w", encoding="utf-8") as log:
        line = [sys.executable, "-m", "dist_llm", "launch", "--config", config]
        subprocess.run(line, check=True, stdout=log, stderr=log)


def main() -> None:
    """Plan the ladder and the run beyond it, train them, fit, and print the fit and the foresight."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs are, or go (a temporary folder)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, of one thread each (2)")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="ladder-"))).resolve()
    words = _corpus([*COMMON.split(), f"run.dir={folder / 'runs'}", "launcher.threads=1"])
    plans = [
        _ask("plan", "ladder", "run.name=small", *words, "--flops", BUDGETS, "--runs", RUNS, "--write", folder / "a"),
        _ask("plan", "ladder", "run.name=large", *words, "--flops", HELD_OUT, "--runs", 1, "--write", folder / "b"),
    ]
    configs = sorted(str(path) for part in ("a", "b") for path in (folder / part / "configs").glob("*.yaml"))
    assert len(configs) == RUNS + 1, plans
    with ThreadPoolExecutor(arguments.jobs) as jobs:
        # The longest first, for none to run alone at the end.
        list(jobs.map(_train, reversed(configs)))
    runs = sorted(str(path) for path in (folder / "runs").iterdir())
    fit = ["plan", "fit", *runs, "--hold-out", "large-*", "--write", str(folder / "law.json")]
    fit += ["--curves", str(folder / "law.png")]
    subprocess.run([sys.executable, "-m", "dist_llm", *fit], check=True)


if __name__ == "__main__":
    main()
