"""What one microbatch costs a stage in activations: measured on two of them, without a pipeline around.

    forward   peak while it runs, bytes that stay until the backward (saved tensors and the output)
    backward  peak while it runs; all that stayed is freed. The first makes gradients, later ones add to them
    split     the first half frees what only it needs, the second half the rest (x and dy of every linear)

planner/pipeline_memory.py puts them in the order of a rank's work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm.accounting.stage_memory import StageMemory
from dist_llm.parallel.activations import ActivationLog
from dist_llm.parallel.live import gradients, parameters
from dist_llm.parallel.pipeline import LossFunction, StageModule
from dist_llm.parallel.split_backward import finish_backward
from dist_llm.parallel.zero import set_backward_traffic

MEASURED = 2
"""Microbatches that are run."""


@dataclass(frozen=True)
class StageRun:
    """A stage and what goes into it: its input, its loss if it is the last, and what any stage needs.

    keeps: whether a pipeline keeps what the model gives until the backward.
    """

    part: StageModule
    enter: Callable[[], Tensor]
    loss: LossFunction | None
    targets: Tensor
    extras: Mapping[str, Tensor]
    zero: int
    keeps: bool


def measure_stage(run: StageRun, log: ActivationLog) -> StageMemory:
    """Run two microbatches through a stage and both backwards. Issues what they issue."""
    model, split = run.part.model, run.part.later is not None
    inputs = [run.enter() for _ in range(MEASURED)]
    outputs: list[tuple[Tensor, ...]] = []
    marks: list[int] = []
    with log:
        for value in inputs:
            marks.append(log.mark())
            outputs.append(_forward(run, value))
        log.exclude(parameters(model))
        marks.append(log.mark())
    crossing = inputs[0].nbytes if inputs[0].requires_grad else 0, outputs[0][0].nbytes if run.loss is None else 0
    gradient = torch.empty_like(outputs[0][0]) if run.loss is None else None
    with log:
        for index in range(MEASURED):
            set_backward_traffic(model, run.zero, last=index == MEASURED - 1 and not split, complete=not split)
            _backward(outputs.pop(0), gradient, inputs[index])
            log.exclude(gradients(model))
            marks.append(log.mark())
            if run.part.later is not None:
                run.part.later.take()()
                set_backward_traffic(model, run.zero, last=index == MEASURED - 1)
                finish_backward(model)
            log.exclude(gradients(model))
            marks.append(log.mark())
    return _memory(log, marks, *crossing)


def _forward(run: StageRun, value: Tensor) -> tuple[Tensor, ...]:
    """Return what a backward begins at, and what else lives as long."""
    out: Tensor = run.part.model(value, **run.extras)
    if run.loss is None:
        return (out,)
    loss = run.loss(out, run.targets)
    return (loss, out) if run.keeps else (loss,)


def _backward(outputs: tuple[Tensor, ...], gradient: Tensor | None, value: Tensor) -> None:
    torch.autograd.backward(outputs[0], gradient)
    value.grad = None


def _memory(log: ActivationLog, marks: Sequence[int], entering: int, leaving: int) -> StageMemory:
    """Return the bytes of the second microbatch between the points in time."""
    _, second, full, after_first, finished_first, after_second, _ = marks
    held = log.level(full) - log.level(second)
    waiting = log.level(after_first) - log.level(finished_first)
    level = log.level(finished_first)
    return StageMemory(
        forward_peak=log.peak(second, full) - log.level(second),
        held=held,
        first_backward_peak=log.peak(full, after_first) - log.level(full),
        backward_peak=log.peak(finished_first, after_second) - level,
        waiting=waiting,
        weight_peak=log.peak(after_first, finished_first) - log.level(after_first),
        input=entering,
        output=leaving,
    )
