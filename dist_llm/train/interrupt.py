"""Stop at a step boundary when asked: SIGTERM and SIGUSR1 set a flag, and all ranks agree on it between steps.

A signal may reach one rank or all, during a step; the flag is OR-ed over the ranks at every boundary, so either all
save and leave or none does.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class Interruption:
    """Remembers that a signal asked this run to stop."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._asked = False
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Return whether any rank was asked to stop. Issues one all-reduce of one number over the control group."""
        if self._group.size() == 1:
            return self._asked
        flag = torch.tensor([int(self._asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
