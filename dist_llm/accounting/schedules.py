"""In which order each rank of a pipeline works, by schedule. No torch: tests hold torch's own orders equal to these.

F forward   B backward   I backward of the inputs alone   W backward of the weights, later

gpipe        F ... F B ... B                                                   Huang et al. 2019
1f1b         F for each rank below, then B F B F ..., then B                   Narayanan et al. 2021
interleaved  the same in rounds over the chunks of a rank                      Narayanan et al. 2021
zero_bubble  interleaved with I for B; W fills the bubble (ZB-H1)              Qi et al. 2023
zbv          two chunks a rank, down the ranks and up again, I and W apart     Qi et al. 2023, section 6
dualpipev    the same V; F of one chunk beside B of the other                  DeepSeek-V3, 2024
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum

from dist_llm.config.parallel import V_SCHEDULES


class Work(StrEnum):
    """What a rank does with one microbatch in one stage."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"


@dataclass(frozen=True, order=True)
class Action:
    """One piece of work of a rank."""

    work: Work
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Pipe:
    """A pipeline: its schedule, its ranks, the stages of each rank, and the microbatches of a step."""

    schedule: str
    ranks: int
    chunks: int
    microbatches: int

    def order(self, rank: int) -> list[Action]:
        """Return what a rank does, in order."""
        if self.schedule == "gpipe":
            return _waves(self, rank, warmup=self.microbatches)
        if self.schedule == "1f1b":
            return _waves(self, rank, warmup=min(self.microbatches, self.ranks - rank))
        if self.schedule == "zbv":
            return _zbv(self, rank)
        if self.schedule == "dualpipev":
            return _dualpipev(self, rank).actions
        return _looped(self, rank, split=self.schedule == "zero_bubble")

    def pairs(self, rank: int) -> dict[Action, Action]:
        """Return the forwards that run as one with the backward after them: both begin and end together."""
        return _dualpipev(self, rank).pairs if self.schedule == "dualpipev" else {}


def stage_rank(stage: int, pipeline: int, schedule: str) -> int:
    """Return the pipeline rank that holds a stage: they go round, or down and up again in a V."""
    if schedule in V_SCHEDULES:
        return stage if stage < pipeline else 2 * pipeline - 1 - stage
    return stage % pipeline


def crosses(stage: int, pipeline: int, schedule: str) -> bool:
    """Return whether what a stage gives to the next goes to another rank."""
    return stage_rank(stage, pipeline, schedule) != stage_rank(stage + 1, pipeline, schedule)


def _waves(pipe: Pipe, rank: int, warmup: int) -> list[Action]:
    """One stage a rank: `warmup` forwards, then a backward before each of the others, then the rest."""
    count = pipe.microbatches
    forwards = [Action(Work.FORWARD, rank, index) for index in range(count)]
    backwards = [Action(Work.BACKWARD, rank, index) for index in range(count)]
    steady = [action for pair in zip(backwards, forwards[warmup:], strict=False) for action in pair]
    return [*forwards[:warmup], *steady, *backwards[count - warmup :]]


def _looped(pipe: Pipe, rank: int, split: bool) -> list[Action]:
    """Microbatches in rounds: each round goes through all chunks of the rank before the next begins."""
    ranks, chunks, count = pipe.ranks, pipe.chunks, pipe.microbatches
    size = count // max(1, count // ranks)
    total = chunks * count

    def action(work: Work, index: int) -> Action:
        turn, within = divmod(index, size)
        chunk = turn % chunks if work is Work.FORWARD else chunks - 1 - turn % chunks
        return Action(work, chunk * ranks + rank, turn // chunks * size + within)

    warmup = min(total, (chunks - 1) * size + (1 if split else 2) * (ranks - 1 - rank))
    order = [action(Work.FORWARD, index) for index in range(warmup)]
    for index in range(total):
        if warmup + index < total:
            order.append(action(Work.FORWARD, warmup + index))
        order.append(action(Work.INPUT if split else Work.BACKWARD, index))
        if split and index >= rank:
            order.append(action(Work.WEIGHT, index - rank))
    if split:
        order.extend(action(Work.WEIGHT, index) for index in range(max(0, total - rank), total))
    return order


class _Program:
    """A rank's actions while they are written down: each kind of work takes a stage's microbatches in turn."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.pairs: dict[Action, Action] = {}
        self.done: Counter[tuple[Work, int]] = Counter()
        self._waiting: deque[int] = deque()

    def add(self, *steps: tuple[Work, int]) -> None:
        """Append work on the next microbatch of a stage."""
        for work, stage in steps:
            self.actions.append(Action(work, stage, self.done[work, stage]))
            self.done[work, stage] += 1
            if work is Work.BACKWARD:
                self.done[Work.INPUT, stage] += 1
                self.done[Work.WEIGHT, stage] += 1
            elif work is Work.INPUT:
                self.done[Work.BACKWARD, stage] += 1
                self._waiting.append(stage)

    def add_pair(self, forward: int, backward: int) -> None:
        """Append a forward of one stage that runs as one with a backward of another."""
        self.add((Work.FORWARD, forward), (Work.BACKWARD, backward))
        self.pairs[self.actions[-2]] = self.actions[-1]

    def add_waiting_weight(self) -> None:
        """Append the backward of the weights that has waited longest, if any waits."""
        if self._waiting:
            self.add((Work.WEIGHT, self._waiting.popleft()))


def _zbv(pipe: Pipe, rank: int) -> list[Action]:
    ranks = pipe.ranks
    down, up = rank, 2 * ranks - 1 - rank
    forward_down, input_down, weight_down = ((work, down) for work in (Work.FORWARD, Work.INPUT, Work.WEIGHT))
    forward_up, input_up, weight_up = ((work, up) for work in (Work.FORWARD, Work.INPUT, Work.WEIGHT))
    # Written for as many microbatches as fill the pipeline; what a smaller step lacks is left out at the end.
    count, program = max(2 * ranks - 1, pipe.microbatches), _Program()
    done = program.done
    program.add(*[forward_down] * (2 * (ranks - rank) - 1))
    program.add(*[forward_up, forward_down] * rank)
    program.add(*[forward_up, input_up, weight_up] * (ranks - rank))
    while done[forward_up] < done[forward_down] or done[forward_down] < count:
        if done[forward_down] < count:
            program.add(forward_down)
        program.add(input_down, weight_down, forward_up, input_up, weight_up)
    program.add(*[input_down, input_up] * rank)
    program.add(*[input_down, weight_down] * (ranks - rank))
    program.add(*[weight_up] * (count - done[weight_up]))
    program.add(*[weight_down] * (count - done[weight_down]))
    return [action for action in program.actions if action.microbatch < pipe.microbatches]


def _dualpipev(pipe: Pipe, rank: int) -> _Program:
    ranks = pipe.ranks
    down, up = rank, 2 * ranks - 1 - rank
    below = ranks - 1 - rank
    forward_down, forward_up, backward_up = (Work.FORWARD, down), (Work.FORWARD, up), (Work.BACKWARD, up)
    program = _Program()
    program.add(*[forward_down] * (2 * below))
    program.add(*[forward_down, forward_up] * (rank + 1))
    for _ in range(below):
        program.add((Work.INPUT, up))
        program.add_waiting_weight()
        program.add(forward_up)
    for index in range(pipe.microbatches - 2 * ranks + rank + 1):
        if index == 0 and rank == ranks - 1:
            program.add(forward_down, backward_up)
        else:
            program.add_pair(down, up)
        program.add_pair(up, down)
    for _ in range(below):
        program.add(backward_up)
        program.add_pair(up, down)
    split = False
    for index in range(rank + 1):
        middle = index == (rank + 1) // 2
        split = split or (middle and rank % 2 == 1)
        program.add((Work.INPUT if split else Work.BACKWARD, up))
        split = split or middle
        program.add((Work.INPUT if split else Work.BACKWARD, down))
    for _ in range(below):
        program.add_waiting_weight()
        program.add((Work.INPUT if split else Work.BACKWARD, down))
    for _ in range(rank + 1):
        program.add_waiting_weight()
    return program
