"""Write curves.json anew from one process in fp64 and say how far each curve moved: `make golden`.

The diff is a change of the numbers that a run computes; whoever commits it says why.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from dist_llm.runtime.pool import WorkerPool
from tests.golden.curves import CURVES, MODELS, golden_config, read_curves, train_curve, write_curves, write_tokens
from tests.parallel.tiny import Curve, largest_gap
from tests.tolerances import FP64


def main() -> int:
    """Regenerate; curves that agree with the stored ones to the tolerance are left as they are."""
    before = read_curves() if CURVES.exists() else {}
    curves: dict[str, Curve] = {}
    with tempfile.TemporaryDirectory() as folder, WorkerPool(1) as pool:
        prefix = write_tokens(Path(folder))
        for name in MODELS:
            curve = pool.run(train_curve, golden_config(name, "fp64"), prefix, world=1)[0]
            gap = largest_gap(curve, before[name]) if name in before else float("inf")
            curves[name] = before[name] if gap <= FP64 else curve
            verdict = "kept" if gap <= FP64 else "written anew"
            print(f"golden: {name}: largest relative change {gap:.1e}: {verdict}")
    write_curves(curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
