"""End a run at a step boundary, on all ranks or on none: asked by a signal, or because a hook of one rank failed.

SIGTERM, SIGUSR1 and Ctrl-C may reach one rank or all, during a step; a full disk is met by the rank that writes. Both
are noted, and between steps the worst note of all ranks is every rank's: all save and leave, or all raise one error.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from dist_llm.checkpoint.agreement import connect, each
from dist_llm.train.loop import Hook

_GO_ON, _STOP, _FAILED = 0, 1, 2
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interruption:
    """Remembers that a signal asked this run to stop, and what failed on this rank alone."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._note = _GO_ON
        self._failure: Exception | None = None
        self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # Whoever presses Ctrl-C again will not wait for the step to end.
            signal.signal(number, signal.default_int_handler)
        self._note = max(self._note, _STOP)

    def attempt(self, work: Callable[[], None]) -> None:
        """Do what issues no collective, and keep its failure until all ranks can agree on it."""
        try:
            work()
        except Exception as error:  # whatever it is, the other ranks are on their way into the next collective
            self._failure = self._failure or error
            self._note = _FAILED

    def shield(self, hook: Hook) -> Hook:
        """Return the hook with `attempt` around it."""
        return lambda record: self.attempt(lambda: hook(record))

    def agreed(self) -> bool:
        """Return whether any rank was asked to stop; raise on all ranks what failed on one.

        Issues one all-reduce of one number over the control group.
        """
        note = torch.tensor([self._note])
        if self._group.size() > 1:
            dist.all_reduce(note, op=dist.ReduceOp.MAX, group=self._group)
        if note.item() == _FAILED:
            each(connect(self._group), self.raise_failure)
        return note.item() == _STOP

    def raise_failure(self) -> None:
        """Raise what failed on this rank, if anything did."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
