"""Every figure of how good predictions are: `make foresight`.

    python -m benchmarks.foresight [ANCHORS] [--machine]

First figures typed from papers and a plan's time; then, with the folder of third-party tables, the tables; with
--machine also runs on this machine (an hour). What is skipped is said, with the reason. Exit code 1: a bound is missed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.foresight_memory import KORTHIKANTI, korthikanti_config
from dist_llm.planner.footprint import predict_memory
from dist_llm.planner.published_laws import parametric
from dist_llm.planner.repetition import repeated_loss
from dist_llm.planner.serving import cheapest_as_good_as
from tests.planner.test_cost_published import errors, korthikanti_rows, narayanan_rows

Line = tuple[str, str, str, bool]
"""Item, figure reached, bound, whether it holds."""

TABLES = ("foresight_laws", "foresight_step_time", "foresight_memory")
MACHINE = ("foresight_machine", "foresight_ladder")
PLAN = ["plan", "budget.flops=1e22", "cluster=h100-sxm", "cluster.nodes=8", "--json"]


def papers() -> Iterator[Line]:
    """Yield what is checked against figures typed from papers."""
    for name, pairs in (
        ("Narayanan et al. 2021, table 1: mean error of 10 steps", narayanan_rows()),
        ("Korthikanti et al. 2022, table 5: mean error of 8 steps", korthikanti_rows()),
    ):
        found = errors(pairs)
        mean = sum(map(abs, found)) / len(found)
        worst, sign = max(found, key=abs), sum(found) / len(found)
        yield name, f"{mean:.1f} % (worst {worst:+.1f}, sign {sign:+.1f})", "<= 7 %", mean <= 7
    gaps = [_activation_gap(name) for name in KORTHIKANTI]
    yield (
        "Korthikanti et al. 2022, equation 4: activations of 4 models, worst",
        f"{max(gaps):.2%}",
        "<= 2 %",
        max(gaps) <= 0.02,
    )
    gap = abs(repeated_loss(parametric("muennighoff"), 6.34e9, 242e9, 25e9) - 2.2256440889984477)
    yield "Muennighoff et al. 2023, check value: gap", f"{gap:.1g}", "<= 1e-12", gap <= 1e-12
    served = cheapest_as_good_as(parametric("hoffmann-3"), 13e9, 2e12)
    size, saved = served.num_params / 1e9, served.saved_share
    yield (
        "Sardana et al. 2024: a 13B's quality, 2T tokens served",
        f"{size:.2f}B, {saved:.1%} saved",
        "7B +- 0.3, 16 to 17 %",
        abs(size - 7) <= 0.3 and 0.16 <= saved <= 0.17,
    )


def plan_time() -> Iterator[Line]:
    """Yield how long a plan takes, as a command, and whether it loads torch."""
    code = "import sys\nfrom dist_llm.cli.main import main\nmain(sys.argv[1:])\nsys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *PLAN], stdout=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - start
    how = "without torch" if done.returncode == 0 else "with torch loaded, or failed"
    yield f"dist-llm {' '.join(PLAN)}", f"{seconds:.1f} s {how}", "< 3 s", seconds < 3 and done.returncode == 0


def _activation_gap(name: str) -> float:
    """Return how far activations of a model without recompute are from equation 2 (tensor parallel alone)."""
    layers, hidden, heads, tensor, pipeline, chunks, microbatch, _ = KORTHIKANTI[name]
    unit = 2048 * microbatch * hidden * layers * (1 + (pipeline - 1) / (pipeline * chunks) if chunks > 1 else 1)
    expected = unit * (10 + 24 / tensor + 5 * heads * 2048 / (hidden * tensor))
    found = predict_memory(*korthikanti_config(name, False, "none")).ranks[0].components.activations
    return abs(found / expected - 1)


def _run(names: tuple[str, ...], *words: str) -> bool:
    """Run scripts beside this one; return whether all kept their bounds."""
    codes = []
    for name in names:
        print(f"\n{name}:", flush=True)
        codes.append(subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *words], check=False).returncode)
    return not any(codes)


def main() -> int:
    """Print every figure, and say what is skipped and why."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("anchors", nargs="?", type=Path, help="folder of third-party tables")
    parser.add_argument("--machine", action="store_true", help="also calibrate, and train a ladder, here (an hour)")
    arguments = parser.parse_args()
    good = True
    for item, figure, bound, holds in (*papers(), *plan_time()):
        print(f"{'  ' if holds else '! '}{item}: {figure} ({bound})")
        good = good and holds
    if arguments.anchors is None:
        print("\nskipped, for ANCHORS names no folder of third parties' tables:", ", ".join(TABLES))
    elif not any(arguments.anchors.glob("*.csv")):
        print(f"\nskipped, for there are no tables (*.csv) in {arguments.anchors}:", ", ".join(TABLES))
    else:
        good = _run(TABLES, str(arguments.anchors)) and good
    if arguments.machine:
        good = _run(MACHINE) and good
    else:
        print(
            "\nskipped, for it trains for an hour (MACHINE=1):", ", ".join(MACHINE), "- docs/foresight.md has figures"
        )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
