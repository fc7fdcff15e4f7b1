"""The tensor axis of one process without a group, and of two ranks of the pool."""

from __future__ import annotations

import torch.distributed as dist

from dist_llm.runtime.mesh import Axis

ALONE = Axis("tp", dist.ProcessGroup(0, 1), 0, 1)


def two_ranks() -> Axis:
    """Return the axis over all ranks of this job."""
    group = dist.group.WORLD
    assert group is not None
    return Axis("tp", group, dist.get_rank(), dist.get_world_size())
