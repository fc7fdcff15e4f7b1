"""How many cores there are to compute on; no torch."""

from __future__ import annotations

import os
import sys


def usable_cores() -> int:
    """Return the cores that this job may use on this node, whatever core the launcher bound this rank to."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    bound = os.sched_getaffinity(0)
    try:
        # The kernel cuts the widest mask down to the job's own cpuset (container or SLURM cgroup); then it is put back.
        os.sched_setaffinity(0, range(8192))
        return len(os.sched_getaffinity(0))
    except OSError:
        return len(bound)
    finally:
        os.sched_setaffinity(0, bound)
