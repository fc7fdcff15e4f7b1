"""A process group of any size in one process: collectives return at once and move nothing (torch's `fake` backend).

For what needs the shape of a world and not its numbers: tensors without values, memory, which layouts can be built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_llm.runtime.process import forget_placements


@contextmanager
def fake_group(world_size: int, rank: int) -> Iterator[None]:
    """Make this process rank `rank` of a world of `world_size` ranks that are not there.

    Raises RuntimeError where this process is already in a group.
    """
    if dist.is_initialized():
        raise RuntimeError("a fake group needs a process that is in no group")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        forget_placements()
