"""A schedule's order is torch's own, does all the work once, and never waits for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from dist_llm.accounting.schedules import Action, Pipe, Work, crosses, stage_rank
from dist_llm.config.parallel import V_SCHEDULES

TORCH = {
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}
WORK = {
    "FORWARD": Work.FORWARD,
    "FULL_BACKWARD": Work.BACKWARD,
    "BACKWARD_INPUT": Work.INPUT,
    "BACKWARD_WEIGHT": Work.WEIGHT,
}


def pipes(schedule: str) -> Iterator[Pipe]:
    """Yield pipelines of up to 5 ranks that the schedule takes."""
    for ranks in (2, 3, 4, 5):
        if schedule in V_SCHEDULES:
            choices: tuple[int, ...] = (2,)
        else:
            choices = {"gpipe": (1,), "1f1b": (1,), "interleaved": (2, 3), "zero_bubble": (1, 2, 3)}[schedule]
        for chunks in choices:
            for microbatches in range(1, 17):
                rounds = max(1, microbatches // ranks)
                short = {"1f1b": ranks, "dualpipev": 2 * ranks}.get(schedule, 1)
                if microbatches >= short and not (schedule in ("interleaved", "zero_bubble") and microbatches % rounds):
                    yield Pipe(schedule, ranks, chunks, microbatches)


class _Stage(_PipelineStageBase):  # type: ignore[misc]
    def __init__(self, index: int, pipe: Pipe) -> None:
        self.stage_index, self.num_stages = index, pipe.ranks * pipe.chunks
        self.group_rank, self.group_size, self.has_backward = 0, pipe.ranks, True
        self.submod = None

    def _create_grad_recv_info(self, *_: Any) -> Any: ...
    def _prepare_backward_infra(self, *_: Any) -> Any: ...
    def _prepare_forward_infra(self, *_: Any) -> Any: ...


def _flat(actions: Any) -> Iterator[Any]:
    for action in actions:
        if action is not None and action.sub_actions:
            yield from action.sub_actions
        elif action is not None:
            yield action


def torchs(pipe: Pipe) -> Any:
    """Return torch's schedule of a pipeline, over stages that compute nothing."""
    held = [s for s in range(pipe.ranks * pipe.chunks) if stage_rank(s, pipe.ranks, pipe.schedule) == 0]
    stages = [_Stage(index, pipe) for index in held]
    return TORCH[pipe.schedule](stages, pipe.microbatches, loss_fn=lambda output, target: output)


@pytest.mark.parametrize("schedule", TORCH)
def test_the_order_is_torchs(schedule: str) -> None:
    count = 0
    for pipe in pipes(schedule):
        theirs = torchs(pipe)
        for rank in range(pipe.ranks):
            actions = _flat(theirs.pipeline_order[rank])
            expected = [Action(WORK[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions]
            assert pipe.order(rank) == expected, (pipe, rank)
            count += 1
    assert count > 50


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", *TORCH])
def test_all_work_is_done_once_where_its_stage_is(schedule: str) -> None:
    for pipe in pipes(schedule):
        for rank in range(pipe.ranks):
            done = Counter(pipe.order(rank))
            assert set(done.values()) == {1}
            stages = {action.stage for action in done}
            assert len(stages) == pipe.chunks
            assert all(stage_rank(stage, pipe.ranks, schedule) == rank for stage in stages)
            for stage in stages:
                for microbatch in range(pipe.microbatches):
                    whole, inputs, weights = (
                        done[Action(work, stage, microbatch)] for work in (Work.BACKWARD, Work.INPUT, Work.WEIGHT)
                    )
                    assert done[Action(Work.FORWARD, stage, microbatch)] == 1
                    assert (whole, inputs, weights) in ((1, 0, 0), (0, 1, 1))


def needs(action: Action, last: int) -> list[set[Action]]:
    """Return what comes before an action: of each set one."""
    work, stage, microbatch = action.work, action.stage, action.microbatch

    def of(*works: Work, at: int) -> set[Action]:
        return {Action(each, at, microbatch) for each in works}

    if work is Work.FORWARD:
        return [of(Work.FORWARD, at=stage - 1)] if stage else []
    if work is Work.WEIGHT:
        return [of(Work.INPUT, at=stage)]
    above = [] if stage == last else [of(Work.BACKWARD, Work.INPUT, at=stage + 1)]
    return [of(Work.FORWARD, at=stage), *above]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", *TORCH])
def test_no_rank_waits_for_ever(schedule: str) -> None:
    for pipe in pipes(schedule):
        left = {rank: pipe.order(rank)[::-1] for rank in range(pipe.ranks)}
        done: set[Action] = set()
        while any(left.values()):
            before = len(done)
            for order in left.values():
                while order and all(done & each for each in needs(order[-1], pipe.ranks * pipe.chunks - 1)):
                    done.add(order.pop())
            assert len(done) > before, (pipe, {rank: order[-1:] for rank, order in left.items()})


def test_a_v_turns_on_the_last_rank() -> None:
    assert [stage_rank(stage, 3, "zbv") for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert [crosses(stage, 3, "dualpipev") for stage in range(5)] == [True, True, False, True, True]
    assert [stage_rank(stage, 3, "interleaved") for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert all(crosses(stage, 3, "interleaved") for stage in range(5))
