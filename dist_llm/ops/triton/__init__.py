"""Triton versions of the ops, one a file: kernels and a launcher of plain tensors, to be imported only where used.

Invariant: nothing above this package imports it at import time, since triton is optional and takes seconds to load.
Each kernel's docstring counts the bytes that it moves against the least that could be; an element is B bytes wide.
Kernels are Triton's language, not Python's, so neither mypy nor the shape checks of tests read them (no_type_check).
No kernel uses atomics or depends on how many programs run at once: results are the same bit for bit from run to run.
"""
