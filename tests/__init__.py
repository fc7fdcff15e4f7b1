"""All tests. Shapes in the signatures of the packages below are checked at every call of this process.

In the ranks of a pool they are checked under CHECK_SHAPES alone (tests/parallel/test_shapes.py): a check costs as much
as an operation on a tiny tensor. The hook is set here because a rank imports its jobs from this package first.
"""

from __future__ import annotations

import multiprocessing
import os

from jaxtyping import install_import_hook

CHECKED = ("dist_llm.ops", "dist_llm.models", "dist_llm.parallel", "dist_llm.engine")

if multiprocessing.parent_process() is None or os.environ.get("CHECK_SHAPES"):
    install_import_hook(CHECKED, "beartype.beartype")
