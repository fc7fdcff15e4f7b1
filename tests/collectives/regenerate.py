"""Write golden.json anew from the formulas of accounting/traffic.py and say what moved: `make golden`.

The diff is a change of what a step sends; whoever commits it says why. The tests then hold real steps to it.
"""

from __future__ import annotations

import sys

from tests.collectives.layouts import GOLDEN, LAYOUTS, by_formula, config_of, name_of, read_golden, write_golden


def main() -> int:
    """Regenerate."""
    before = read_golden() if GOLDEN.exists() else {}
    golden = {}
    for ranks, parallel, model in LAYOUTS:
        name = name_of(parallel, model)
        golden[name] = by_formula(config_of(parallel, model), ranks)
        if golden[name] != before.get(name):
            print(f"collectives: {name}: written anew")
    write_golden(golden)
    return 0


if __name__ == "__main__":
    sys.exit(main())
