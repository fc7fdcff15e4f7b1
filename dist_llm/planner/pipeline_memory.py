"""The most activations that a pipeline rank holds while it carries out its program; nothing runs here.

What a microbatch costs a stage is measured (parallel/stage_memory.py) or reckoned (native_stage.py); what crosses
between ranks is torch's doing:
           receives                    outputs                        gradients of inputs
    old    a buffer each, all step     one stage: until the backward  1f1b: until the next is there
                                       several: until the step ends   others: until the step ends
    2.15   from the receive until      one stage: until sent          the same
           the backward is done        several: until the backward
One stage on a rank: gpipe, 1f1b; the others may hold several. Old: before torch 2.15. Tests compare this with runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from dist_llm.accounting.schedules import Action, Pipe, Work, crosses
from dist_llm.accounting.stage_memory import StageMemory
from dist_llm.planner.messages import Message, Program

Stages = Mapping[int, StageMemory]
"""Stages of one rank and what a microbatch costs each."""


def most_activations(pipe: Pipe, program: Program, stages: Stages, as_needed: bool) -> int:
    """Return the most bytes of activations of these stages while their rank carries out its program.

    as_needed: whether torch takes a buffer when a rank receives (2.15), rather than those of a step at its beginning.
    """
    return max(levels(pipe, program, stages, as_needed))


def levels(pipe: Pipe, program: Program, stages: Stages, as_needed: bool) -> Iterator[int]:
    """Yield the most bytes in each piece of a rank's work, the first before any."""
    buffers: _Buffers = (_BuffersAsNeeded if as_needed else _BuffersOfAStep)(pipe, stages)
    level, begun = buffers.at_start(), set[int]()
    yield level
    for step in program:
        if isinstance(step, Message):
            level += 0 if step.sends else buffers.receive(step)
            continue
        if step.stage not in stages:
            continue
        level += buffers.before(step)
        for peak, change in _pieces(step.work, stages[step.stage], first=step.stage not in begun):
            yield level + peak
            level += change
        level += buffers.after(step)
        begun.update(() if step.work is Work.FORWARD else (step.stage,))


def _pieces(work: Work, stage: StageMemory, first: bool) -> list[tuple[int, int]]:
    """Return, for each piece of a work, the most bytes that it holds above what was there and how many more it leaves.

    A backward whose weights wait is two pieces here; its output stays until the second is done. first: whether no
    backward of the stage has gone before.
    """
    if work is Work.FORWARD:
        return [(stage.forward_peak, stage.held)]
    if work is Work.WEIGHT:
        return [(stage.weight_peak, -stage.waiting)]
    peak = stage.first_backward_peak if first else stage.backward_peak
    if work is Work.BACKWARD and stage.waiting:
        stays = stage.waiting + stage.output
        return [(peak, stays - stage.held), (stage.weight_peak, -stays)]
    return [(peak, stage.waiting - stage.held)]


class _Buffers(Protocol):
    """Bytes that crossing between ranks adds to what stages hold, or takes away."""

    def at_start(self) -> int: ...
    def receive(self, message: Message) -> int: ...
    def before(self, action: Action) -> int: ...
    def after(self, action: Action) -> int: ...


class _BuffersOfAStep:
    """What comes has its buffer all the step."""

    def __init__(self, pipe: Pipe, stages: Stages) -> None:
        self._pipe, self._stages, self._given = pipe, stages, _Given(pipe)

    def at_start(self) -> int:
        return self._pipe.microbatches * sum(stage.input + stage.output for stage in self._stages.values())

    def receive(self, message: Message) -> int:
        return 0

    def before(self, action: Action) -> int:
        return 0

    def after(self, action: Action) -> int:
        if action.work not in (Work.BACKWARD, Work.INPUT):
            return 0
        stage = self._stages[action.stage]
        sent = 0 if _one_stage(self._pipe) else stage.output * _leaves(self._pipe, action.stage)
        return sent + self._given.gradient(stage, action.stage)


class _BuffersAsNeeded:
    """What comes has a buffer from its receive, or from the stage of this rank that makes it, until the backward.

    A rank of one stage receives when it needs to. It lets an output go when it was sent: 1f1b after the next forward or
    before the next backward, gpipe all of them before the first backward.
    """

    def __init__(self, pipe: Pipe, stages: Stages) -> None:
        self._pipe, self._stages, self._given = pipe, stages, _Given(pipe)
        self._unsent = 0

    def at_start(self) -> int:
        return 0

    def receive(self, message: Message) -> int:
        stage = self._stages.get(message.stage + (1 if message.forward else -1))
        if stage is None or _one_stage(self._pipe):
            return 0
        return stage.input if message.forward else stage.output

    def before(self, action: Action) -> int:
        if not _one_stage(self._pipe):
            return 0
        stage = self._stages[action.stage]
        if action.work is Work.FORWARD:
            return stage.input
        sent, self._unsent = self._unsent, 0
        return stage.output - sent

    def after(self, action: Action) -> int:
        stage = self._stages[action.stage]
        if action.work is Work.WEIGHT:
            return 0
        if action.work is Work.FORWARD:
            return -self._send(stage.output)
        given = self._given.gradient(stage, action.stage)
        if _one_stage(self._pipe):
            # The output, counted in `held`, was let go before; the gradient that came for it goes instead.
            return given - stage.input
        came = stage.output * (_leaves(self._pipe, action.stage) or action.stage + 1 in self._stages)
        entered = stage.input * _comes(self._pipe, action.stage)
        local = stage.input * (not _comes(self._pipe, action.stage) and action.stage - 1 in self._stages)
        return given + local - came - entered

    def _send(self, output: int) -> int:
        """Take an output on its way; return the bytes of those let go since."""
        if not _one_stage(self._pipe):
            return 0
        sent = 0 if self._pipe.schedule == "gpipe" else self._unsent
        self._unsent += output - sent
        return sent


class _Given:
    """Gradients of inputs on their way to the stage before: those of a step, or under 1f1b always the last one."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe, self._any = pipe, False

    def gradient(self, stage: StageMemory, index: int) -> int:
        """Return the bytes that a backward adds to them."""
        replaced = self._any and self._pipe.schedule == "1f1b"
        self._any = True
        return 0 if replaced else stage.input * _comes(self._pipe, index)


def _one_stage(pipe: Pipe) -> bool:
    return pipe.schedule in ("gpipe", "1f1b")


def _leaves(pipe: Pipe, stage: int) -> bool:
    """Return whether what a stage gives to the next goes to another rank."""
    return crosses(stage, pipe.ranks, pipe.schedule)


def _comes(pipe: Pipe, stage: int) -> bool:
    return crosses(stage - 1, pipe.ranks, pipe.schedule)
