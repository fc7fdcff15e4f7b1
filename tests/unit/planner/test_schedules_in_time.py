"""Bubbles are those of the formulas; messages of every schedule match, and a broken program is found."""

from __future__ import annotations

import pytest

from dist_llm.accounting.schedules import Action, Pipe, Work, stage_rank
from dist_llm.planner.messages import Message, Program, prove, write_programs
from dist_llm.planner.schedule_trace import trace_schedule
from tests.unit.accounting.test_schedules import TORCH, WORK, pipes, torchs

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev")


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("microbatches", [8, 16, 32])
def test_bubbles_are_those_of_the_formulas(ranks: int, microbatches: int) -> None:
    def idle(schedule: str, chunks: int = 1) -> float:
        return trace_schedule(Pipe(schedule, ranks, chunks, microbatches)).idle_share

    assert idle("gpipe") == idle("1f1b") == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    for chunks in (2, 4):
        expected = (ranks - 1) / (chunks * microbatches + ranks - 1)
        assert idle("interleaved", chunks) == pytest.approx(expected)
    # ZB-H1 leaves a third of 1F1B's bubble where F, I and W take equally long.
    assert idle("zero_bubble") == pytest.approx((ranks - 1) / (3 * microbatches + ranks - 1))
    if microbatches >= 2 * ranks:
        assert idle("zbv", 2) * 6 * microbatches <= 2 * ranks


def test_memory_is_bought_and_sold() -> None:
    def most(schedule: str, chunks: int = 1) -> list[int]:
        trace = trace_schedule(Pipe(schedule, 4, chunks, 16))
        return [trace.most_in_flight(rank) for rank in range(4)]

    assert most("gpipe") == [16] * 4
    assert most("1f1b") == [4, 3, 2, 1]
    assert max(most("zbv", 2)) <= 2 * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_messages_match_and_nobody_waits_for_ever(schedule: str) -> None:
    for pipe in pipes(schedule):
        prove(pipe, write_programs(pipe))


@pytest.mark.parametrize("schedule", TORCH)
def test_what_torch_carries_out_is_proven(schedule: str) -> None:
    kinds = {"SEND_F": (True, True), "SEND_B": (True, False), "RECV_F": (False, True), "RECV_B": (False, False)}
    for pipe in pipes(schedule):
        theirs = torchs(pipe).pipeline_order_with_comms
        programs: list[Program] = []
        for rank in range(pipe.ranks):
            program: Program = []
            for each in [sub for action in theirs[rank] for sub in action.sub_actions or (action,)]:
                name, stage = each.computation_type.name, each.stage_index
                if name in WORK:
                    program.append(Action(WORK[name], stage, each.microbatch_index))
                elif name in kinds:
                    sends, forward = kinds[name]
                    other = stage + (1 if forward else -1) * (1 if sends else -1)
                    peer = stage_rank(other, pipe.ranks, schedule)
                    program.append(Message(sends, forward, stage if sends else other, each.microbatch_index, peer))
            programs.append(program)
        prove(pipe, programs)


def test_a_broken_program_is_found() -> None:
    pipe = Pipe("1f1b", 2, 1, 4)
    swapped = write_programs(pipe)
    sends = [index for index, step in enumerate(swapped[0]) if isinstance(step, Message) and step.sends]
    swapped[0][sends[0]], swapped[0][sends[1]] = swapped[0][sends[1]], swapped[0][sends[0]]
    with pytest.raises(ValueError, match="rank 1 does not receive in order"):
        prove(pipe, swapped)
    lost = write_programs(pipe)
    lost[1] = [step for step in lost[1] if not isinstance(step, Message) or step.sends or step.microbatch]
    with pytest.raises(ValueError, match="does not receive"):
        prove(pipe, lost)
    late = write_programs(pipe)
    backward = next(step for step in late[0] if isinstance(step, Action) and step.work is Work.BACKWARD)
    late[0].remove(backward)
    late[0].insert(0, backward)
    with pytest.raises(ValueError, match="wait for ever"):
        prove(pipe, late)
