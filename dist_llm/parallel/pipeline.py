"""One global batch through the model: gradient accumulation when pp = 1, a pipeline schedule when pp > 1.

Schedules come from torch.distributed.pipelining; accounting/schedules.py says what each does. torch's stage would force
ZeRO-1 traffic on an FSDP module, so the stage holds the model behind a plain module and this file sets the traffic of
each backward by ZeRO stage, the same way with and without a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from dist_llm.ops.linear import WeightGradients
from dist_llm.parallel.replicas import ReplicaSum
from dist_llm.parallel.split_backward import finish_backward
from dist_llm.parallel.zero import release, set_backward_traffic
from dist_llm.runtime.mesh import Axis
from dist_llm.types import Batch

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) to the sum of token losses over a fixed constant, a tensor of its own and no view."""


@dataclass(frozen=True)
class Microbatching:
    """How a rank's share of the global batch is cut: `count` microbatches of `size` sequences.

    after_last_forward is called when the rank's last forward of a training step is done, before what follows it.
    """

    size: int
    count: int
    after_last_forward: Callable[[], None]


@runtime_checkable
class Runner(Protocol):
    """Runs a rank's share of a global batch."""

    def forward_backward(self, batch: Batch) -> Float[Tensor, ""]:
        """Accumulate gradients over all microbatches; return the sum of losses (0 except on the last stage)."""
        ...

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the sum of losses without gradients (0 except on the last stage)."""
        ...


def _extras(batch: Batch) -> dict[str, Tensor]:
    """Return what every stage needs beside its input, each with the batch in dim 0."""
    extras = {"samples": batch.samples}
    if batch.documents is not None:
        extras["documents"] = batch.documents
    return extras


def microbatches(batch: Batch, size: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Yield tokens, targets and what else every stage takes, of `size` sequences after another."""
    extras = _extras(batch)
    for start in range(0, batch.tokens.shape[0], size):
        rows = slice(start, start + size)
        yield batch.tokens[rows], batch.targets[rows], {name: value[rows] for name, value in extras.items()}


class Accumulation:
    """All layers on this rank: microbatches one after another."""

    def __init__(self, part: StageModule, loss: LossFunction, cut: Microbatching, zero: int) -> None:
        self._model, self._replicas = part.model, part.replicas
        self._loss, self._cut, self._zero = loss, cut, zero

    def forward_backward(self, batch: Batch) -> Float[Tensor, ""]:
        """Accumulate gradients over the microbatches; return the sum of their losses."""
        total = torch.zeros((), device=batch.tokens.device)
        for index, (tokens, targets, extras) in enumerate(microbatches(batch, self._cut.size)):
            last = index == self._cut.count - 1
            set_backward_traffic(self._model, self._zero, last)
            self._replicas.expect(last)
            loss = self._loss(self._model(tokens, **extras), targets)
            if last:
                self._cut.after_last_forward()
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    @torch.no_grad()
    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the sum of losses without gradients."""
        losses = [self._loss(self._model(x, **extras), y) for x, y, extras in microbatches(batch, self._cut.size)]
        release(self._model)
        return torch.stack(losses).sum()


class _Plain(nn.Module):
    """Hides an FSDP model from torch's pipeline stage, which would otherwise decide its traffic."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.model(*args, **kwargs)
        return out


class _Stage(PipelineStage):
    """A pipeline stage whose gradient traffic follows the ZeRO stage; backwards run in microbatch order."""

    zero: int = 0
    num_microbatches: int = 1
    after_forward: Callable[[], None]
    replicas: ReplicaSum
    _backwards: int = 0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward and say so."""
        out = super().forward_one_chunk(*args, **kwargs)
        self.after_forward()
        return out

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Meet the neighbours before the first step, but not this rank itself, which gloo cannot.

        torch 2.11 asks every stage to, in a V also the two that lie on one rank.
        """
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive into buffers that ask for gradients when a backward follows.

        torch 2.11 settles that for good in the stage's first run, which an evaluation may be.
        """
        receives = super().get_fwd_recv_ops(fwd_chunk_id)
        for receive in receives:
            receive.tensor.requires_grad_(self.has_backward)
        return receives

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run one backward, or its first half; the last of the step reduces what ZeRO has held back."""
        if not self.has_backward:
            return
        model: nn.Module = self.submod.model  # type: ignore[assignment]
        if self.dw_builder is None:
            last = self._is_last()
            set_backward_traffic(model, self.zero, last)
            self.replicas.expect(last)
        else:
            set_backward_traffic(model, self.zero, last=False, complete=False)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if loss is not None:
            loss.detach_()  # torch keeps it until the step ends, and with it a graph that holds what came in
        if self.dw_builder is not None and full_backward:
            self._finish()

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run the second half of a backward."""
        if not self.has_backward:
            return
        super().backward_weight_one_chunk(*args, **kwargs)
        self._finish()

    def _finish(self) -> None:
        """Do with the gradients of a split backward what ZeRO does after it."""
        model: nn.Module = self.submod.model  # type: ignore[assignment]
        last = self._is_last()
        set_backward_traffic(model, self.zero, last)
        finish_backward(model)
        if last:
            self.replicas.send()

    def _is_last(self) -> bool:
        """Count a backward; return whether it is the last of the step."""
        self._backwards = (self._backwards + 1) % self.num_microbatches
        return self._backwards == 0

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Return the gradients for the stage before, on this rank too; none in an evaluation."""
        if not self.has_backward:
            return ()
        return super().get_local_bwd_output(mb_index)  # type: ignore[no-untyped-call]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take the gradients of the stage after, on this rank too; none in an evaluation."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


@dataclass(frozen=True)
class StageModule:
    """A part of the model on this rank, its place among all stages, what adds up its replicas' gradients, and where its
    weight gradients wait, if they do.
    """

    model: nn.Module
    index: int
    count: int
    replicas: ReplicaSum
    later: WeightGradients | None = None


@dataclass(frozen=True)
class StageTensors:
    """What enters and leaves a stage, and on which device.

    Tokens [microbatch, T], hidden states [microbatch, T (or T/tp), D] in the compute format, and this rank's logits
    [microbatch, T, V/tp].
    """

    hidden_shape: tuple[int, ...]
    dtype: torch.dtype
    tokens_shape: tuple[int, ...]
    num_logits: int
    device: torch.device


_DECLARES_GRADIENTS = "input_grads" in signature(PipelineStage).parameters
"""Whether torch's stage wants to be told the gradients' shapes; before 2.12 it takes them from the values'."""

BUFFERS_AS_NEEDED = hasattr(PipelineStage, "release_fwd_send_outputs")
"""Whether torch takes a buffer when a rank receives; before 2.15 those of a whole step are always there."""


def _build_stage(part: StageModule, crossing: StageTensors, axis: Axis) -> _Stage:
    hidden = torch.empty(crossing.hidden_shape, dtype=crossing.dtype, device="meta", requires_grad=True)
    tokens = torch.empty(crossing.tokens_shape, dtype=torch.int64, device="meta")
    logits = torch.empty((*crossing.tokens_shape, crossing.num_logits), dtype=crossing.dtype, device="meta")
    first, last = part.index == 0, part.index == part.count - 1
    grads: dict[str, Any] = {
        "input_grads": None if first else hidden.detach(),
        "output_grads": None if last else hidden.detach(),
    }
    return _Stage(
        _Plain(part.model),
        part.index,
        part.count,
        crossing.device,
        input_args=tokens if first else hidden,
        output_args=logits if last else hidden,
        group=axis.group,
        dw_builder=None if part.later is None else part.later.take,
        **(grads if _DECLARES_GRADIENTS else {}),
    )


_SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MULTIPLE = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Scheduled:
    """A share of the layers on this rank: microbatches flow through the stages of the pp axis by a schedule."""

    def __init__(
        self,
        parts: list[StageModule],
        crossing: StageTensors,
        loss: LossFunction,
        cut: Microbatching,
        zero: int,
        schedule: str,
        axis: Axis,
    ) -> None:
        self._parts = parts
        stages = [_build_stage(part, crossing, axis) for part in parts]
        self._cut, self._forwards = cut, 0
        for stage, part in zip(stages, parts, strict=True):
            stage.replicas = part.replicas
            stage.zero, stage.num_microbatches, stage.after_forward = zero, cut.count, self._count_forward
        options: dict[str, Any] = {"n_microbatches": cut.count, "loss_fn": loss, "scale_grads": False}
        self._schedule: Any
        if (schedule in _SINGLE and len(stages) > 1) or (schedule == "interleaved" and len(stages) == 1):
            raise ValueError(f"{schedule} cannot run {len(stages)} stages on a rank")
        if schedule in _SINGLE:
            self._schedule = _SINGLE[schedule](stages[0], **options)
        else:
            self._schedule = _MULTIPLE[schedule](list(stages), **options)
        self._first = any(part.index == 0 for part in parts)
        self._last = any(part.index == part.count - 1 for part in parts)
        self._device = crossing.device

    def _count_forward(self) -> None:
        if not torch.is_grad_enabled():
            return
        self._forwards += 1
        if self._forwards == self._cut.count * len(self._parts):
            self._forwards = 0
            self._cut.after_last_forward()

    def _run(self, step: Callable[..., Any], batch: Batch) -> Float[Tensor, ""]:
        args = (batch.tokens,) if self._first else ()
        losses: list[Tensor] = []
        target = {"target": batch.targets, "losses": losses} if self._last else {}
        step(*args, **target, return_outputs=False, **_extras(batch))
        if not losses:
            return torch.zeros((), device=self._device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def forward_backward(self, batch: Batch) -> Float[Tensor, ""]:
        """Run the schedule. Issues sends and receives of hidden states and their gradients over pp."""
        return self._run(self._schedule.step, batch)

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        """Run the forwards of the schedule without gradients."""
        with torch.no_grad():
            total = self._run(self._schedule.eval, batch)
        for part in self._parts:
            release(part.model)
        return total
