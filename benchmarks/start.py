"""Time how long a person waits for an answer that trains nothing: `python benchmarks/start.py`.

Each command runs in a fresh interpreter; a figure is the median of `--runs` wall-clock times, with the quickest and the
slowest. The design asks for help in less than 0.5 s and for a config error in less than 1 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS: dict[str, tuple[int, str]] = {
    "help": (0, "--help"),
    "help of a command": (0, "train --help"),
    "config error": (78, "train parallel.tensor=3 model.num_heads=8 optimizer.lrr=1 data.global_batch=7"),
    "config": (0, "train --cfg experiment=quickstart"),
}
"""What is asked and the exit code that answers it, by the name in the table; none of them needs torch."""


def seconds_of(words: str, code: int) -> float:
    """Return the wall-clock seconds of one `dist-llm` command in a fresh interpreter; SystemExit for another code."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dist_llm", *words.split()], capture_output=True, check=False)
    if done.returncode != code:
        raise SystemExit(f"dist-llm {words}: exit code {done.returncode}, not {code}")
    return time.perf_counter() - began


def main() -> None:
    """Print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=7, help="times each command runs (default 7)")
    runs = parser.parse_args().runs
    print(f"{'command':<20}{'median s':>10}{'min':>8}{'max':>8}")
    for name, (code, words) in COMMANDS.items():
        seconds = [seconds_of(words, code) for _ in range(runs)]
        print(f"{name:<20}{statistics.median(seconds):>10.2f}{min(seconds):>8.2f}{max(seconds):>8.2f}")


if __name__ == "__main__":
    main()
