"""A ladder of small runs on real text, the law that fits them, and the loss of a larger run that it foretells.

    python -m benchmarks.foresight_ladder [FOLDER] [--jobs N]

The text is the source of the installed torch, up to 64 MiB of Python and C++, file by file in an order drawn from their
names, so that what is kept for validation is like the rest. Sixteen runs are fitted, and one of more than four times
the compute of the largest is predicted: forty minutes on two cores. Runs that FOLDER holds finished are not trained
again. Sequences are short: in longer ones models so small learn at some step to copy from the context, which is a jump
and no power law. For the same reason all runs have one depth, and one batch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BUDGETS, RUNS = "1.5e12:1.27e13", 16
HELD_OUT = "5.5e13"
KINDS = (".py", ".h", ".cpp", ".cuh", ".hpp")
COMMON = (
    "model=llama-tiny model.vocab_size=512 model.max_seq_len=64 model.num_layers=4 model.init_std=0.08 "
    "data.seq_len=64 data.microbatch=16 data.global_batch=16 data.max_corpus_mib=64 data.validation_fraction=0.02 "
    "telemetry.tensorboard=false telemetry.picture=false checkpoint.interval=0"
)


def _ask(*words: object) -> dict[str, object]:
    """Return what a command answers as JSON."""
    line = [sys.executable, "-m", "dist_llm", *map(str, words), "--json"]
    found: dict[str, object] = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def _write_text(path: Path) -> None:
    """Write the source files of the installed torch as JSONL, in the order of a hash of their names."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.submodule_search_locations is not None
    root = Path(torch.submodule_search_locations[0])
    files = [file for file in root.rglob("*") if file.suffix in KINDS and file.is_file()]
    files.sort(key=lambda file: hashlib.sha256(str(file.relative_to(root)).encode()).digest())
    whole = path.with_suffix(".part")
    with whole.open("w", encoding="utf-8") as text:
        for file in files:
            text.write(json.dumps({"text": file.read_text(encoding="utf-8", errors="replace")}) + "\n")
    whole.rename(path)


def _corpus(words: list[str], text: Path) -> list[str]:
    """Tokenize the text, once; return the runs' overrides."""
    if not text.exists():
        _write_text(text)
    found = _ask("data", "prepare", *words, f"data.path={text}")
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
    folder.mkdir(parents=True, exist_ok=True)
    words = _corpus([*COMMON.split(), f"run.dir={folder / 'runs'}", "launcher.threads=1"], folder / "text.jsonl")
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
