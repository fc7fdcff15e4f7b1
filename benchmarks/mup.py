"""Does the best learning rate stay where it is as a model gets wider? Loss over learning rates, with muP and without.

    PYTHONPATH=. python benchmarks/mup.py --widths 64,128,256 --steps 60

Trains a small Llama on the text of the golden curves at each width and rate (powers of two), and prints the mean loss
of the last steps. A row's best is marked; muP is meant to keep it in one column.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from dist_llm.config.run import RunConfig
from dist_llm.runtime.pool import WorkerPool
from tests.golden.curves import EOS, train_curve, write_tokens
from tests.parallel.tiny import LLAMA, tiny_config

HEAD = 16
RATES = tuple(2.0**-power for power in range(12, 2, -1))


def config_of(width: int, base: int | None, lr: float, steps: int) -> RunConfig:
    """Return the run of a width, in heads of HEAD; base None: the standard parametrisation."""
    sizes = {"hidden_size": width, "num_heads": width // HEAD, "num_kv_heads": width // HEAD}
    model = {**LLAMA, **sizes, "num_layers": 2, "ffn_hidden_size": 2 * width, "vocab_size": EOS + 1, "max_seq_len": 64}
    return tiny_config(
        {"zero": 0},
        {**model, "tie_embeddings": False, "mup": {"base_width": base}},
        {"seq_len": 64, "global_batch": 8, "microbatch": 8},
        run={"steps": steps, "seed": 1},
        optimizer={"lr": lr},
        schedule={"name": "cosine", "warmup_steps": steps // 10},
    )


def main() -> int:
    """Sweep and print a table of each parametrisation."""
    parser = argparse.ArgumentParser(description="Sweep learning rates over widths, with muP and without.")
    parser.add_argument("--widths", default="64,128,256", help=f"multiples of {HEAD} (default 64,128,256)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    widths = [int(width) for width in asked.widths.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as folder, WorkerPool(1, timeout_seconds=600.0) as pool:
        prefix = write_tokens(Path(folder))
        for name, base in (("muP", widths[0]), ("standard", None)):
            for width in widths:
                losses = []
                for lr in RATES:
                    curve = pool.run(train_curve, config_of(width, base, lr, asked.steps), prefix, world=1)[0]
                    last = [loss for loss, _ in curve[-max(1, asked.steps // 10) :]]
                    losses.append(sum(last) / len(last))
                rows.append({"parametrisation": name, "width": width, "losses": losses})
                print(f"{name} {width} done", file=sys.stderr)
    if asked.json:
        print(json.dumps({"steps": asked.steps, "rates": RATES, "rows": rows}, indent=2))
        return 0
    print(f"{'':<15}" + "".join(f"{f'2^{-power}':>8}" for power in range(12, 2, -1)))
    for row in rows:
        best = min(row["losses"])
        cells = (f"{loss:.3f}" + ("*" if loss == best else " ") for loss in row["losses"])
        print(f"{row['parametrisation']:<9}{row['width']:>6}" + "".join(f"{cell:>8}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
