"""Whether Triton's kernels can run here. Imports triton when it is asked, not before."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.util import find_spec


@cache
def triton_problem(device: str) -> str | None:
    """Say why Triton computes nothing on a kind of device here, None where it does."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'dist-llm[triton]'"
    import triton

    if is_interpreted():
        return None
    if device != "cuda":
        return f"triton's kernels are for GPUs, not {device}; TRITON_INTERPRET=1 tests them on a CPU"
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:  # it builds a launcher in C
        return f"triton finds no GPU that it can use: {str(error).strip().partition(chr(10))[0]}"
    return None


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on tensors of any device; their import decided that."""
    from triton.runtime.interpreter import InterpretedFunction

    from dist_llm.ops.triton.column_sum import _column_sum

    return isinstance(_column_sum, InterpretedFunction)
