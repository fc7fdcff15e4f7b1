"""What pipeline ranks tell each other, and the proof that nobody waits for ever.

    program of a rank = its actions, each followed by the sends of what it made; receives where the sender is ready

The proof takes the strictest reading of a backend: a rank's sends and receives are carried out one at a time in the
order of its program, each when its partner has come to the matching one (NCCL on one stream); an action waits for its
own receive. What passes it passes on gloo, which does not block. Buffers of one pair are matched by order alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_llm.accounting.schedules import Action, Pipe, Work, stage_rank


@dataclass(frozen=True)
class Message:
    """The output of an action of `stage`, or the gradient for the stage before it, on its way to another rank."""

    sends: bool
    forward: bool
    stage: int
    microbatch: int
    peer: int


Program = list[Action | Message]
"""What a rank does and tells, in order."""


def _source(action: Action, pipe: Pipe) -> int | None:
    """Return the stage whose result an action starts from, if there is one."""
    if action.work is Work.WEIGHT:
        return None
    neighbour = action.stage + (-1 if action.work is Work.FORWARD else 1)
    return neighbour if 0 <= neighbour < pipe.ranks * pipe.chunks else None


def _target(action: Action, pipe: Pipe) -> int | None:
    """Return the stage that starts from an action's result, if there is one."""
    if action.work is Work.WEIGHT:
        return None
    neighbour = action.stage + (1 if action.work is Work.FORWARD else -1)
    return neighbour if 0 <= neighbour < pipe.ranks * pipe.chunks else None


def write_programs(pipe: Pipe) -> list[Program]:
    """Return each rank's program. ValueError naming what every rank waits for, when the order cannot be carried out."""
    orders = [pipe.order(rank)[::-1] for rank in range(pipe.ranks)]
    programs: list[Program] = [[] for _ in orders]
    pairs = [pipe.pairs(rank) for rank in range(pipe.ranks)]
    known: list[set[tuple[bool, int, int]]] = [set() for _ in orders]
    while any(orders):
        moved = False
        for rank, order in enumerate(orders):
            together = order[-1:] if not order or order[-1] not in pairs[rank] else order[:-3:-1]
            if not together or not all(_is_fed(action, pipe, known[rank]) for action in together):
                continue
            moved = True
            del order[-len(together) :]
            programs[rank].extend(together)
            for action in together:
                _tell(action, rank, pipe, programs, known)
        if not moved:
            waits = {rank: order[-1] for rank, order in enumerate(orders) if order}
            raise ValueError(f"the order cannot be carried out: {waits}")
    return programs


def _is_fed(action: Action, pipe: Pipe, known: set[tuple[bool, int, int]]) -> bool:
    """Return whether what an action starts from has been sent to its rank, or made there."""
    source = _source(action, pipe)
    return source is None or (action.work is Work.FORWARD, source, action.microbatch) in known


def _tell(
    action: Action, rank: int, pipe: Pipe, programs: list[Program], known: list[set[tuple[bool, int, int]]]
) -> None:
    """Write down the message that an action's result is, at both its ends."""
    forward, target = action.work is Work.FORWARD, _target(action, pipe)
    peer = rank if target is None else stage_rank(target, pipe.ranks, pipe.schedule)
    known[peer].add((forward, action.stage, action.microbatch))
    if peer != rank:
        programs[rank].append(Message(True, forward, action.stage, action.microbatch, peer))
        programs[peer].append(Message(False, forward, action.stage, action.microbatch, rank))


def prove(pipe: Pipe, programs: Sequence[Program]) -> None:
    """Raise ValueError unless every message is sent and received once, in one order, and no rank waits for ever."""
    for rank, program in enumerate(programs):
        for peer in range(len(programs)):
            sent = _between(program, sends=True, peer=peer)
            received = _between(programs[peer], sends=False, peer=rank)
            if sent != received:
                raise ValueError(f"rank {peer} does not receive in order what rank {rank} sends to it")
    _carry_out(pipe, programs)


def _between(program: Program, sends: bool, peer: int) -> list[tuple[bool, int, int]]:
    return [
        (step.forward, step.stage, step.microbatch)
        for step in program
        if isinstance(step, Message) and step.sends == sends and step.peer == peer
    ]


def _carry_out(pipe: Pipe, programs: Sequence[Program]) -> None:
    """Run the programs: actions in order, messages in order beside them, each at once when it can be."""
    messages = [[step for step in program if isinstance(step, Message)] for program in programs]
    placed = [_sends_before(program) for program in programs]
    actions = [[step for step in program if isinstance(step, Action)] for program in programs]
    done: list[set[Action]] = [set() for _ in programs]
    come: list[set[tuple[bool, int, int]]] = [set() for _ in programs]
    at_action, at_message = [0] * len(programs), [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for rank in range(len(programs)):
            while at_action[rank] < len(actions[rank]):
                action = actions[rank][at_action[rank]]
                if not _can_run(action, rank, pipe, done[rank], come[rank]):
                    break
                done[rank].add(action)
                at_action[rank] += 1
                moved = True
            while at_message[rank] < len(messages[rank]):
                mine = messages[rank][at_message[rank]]
                peer = mine.peer
                if at_message[peer] >= len(messages[peer]):
                    break
                theirs = messages[peer][at_message[peer]]
                sender = rank if mine.sends else peer
                ready = at_action[sender] >= placed[sender][at_message[sender]]
                if not ready or theirs.peer != rank or theirs.sends == mine.sends:
                    break
                come[peer if mine.sends else rank].add((mine.forward, mine.stage, mine.microbatch))
                at_message[rank] += 1
                at_message[peer] += 1
                moved = True
    stuck = [rank for rank in range(len(programs)) if at_action[rank] < len(actions[rank])]
    if stuck:
        waits: Mapping[int, Action] = {rank: actions[rank][at_action[rank]] for rank in stuck}
        raise ValueError(f"ranks wait for ever: {waits}")


def _sends_before(program: Program) -> list[int]:
    """Return, for each message of a program, how many actions come before it."""
    counts, actions = [], 0
    for step in program:
        if isinstance(step, Action):
            actions += 1
        else:
            counts.append(actions)
    return counts


def _can_run(action: Action, rank: int, pipe: Pipe, done: set[Action], come: set[tuple[bool, int, int]]) -> bool:
    """Return whether what an action starts from is here."""
    microbatch, stage = action.microbatch, action.stage
    if action.work is Work.WEIGHT:
        return Action(Work.INPUT, stage, microbatch) in done
    forward, source = action.work is Work.FORWARD, _source(action, pipe)
    if not forward and Action(Work.FORWARD, stage, microbatch) not in done:
        return False
    if source is None:
        return True
    if stage_rank(source, pipe.ranks, pipe.schedule) != rank:
        return (forward, source, microbatch) in come
    kinds = (Work.FORWARD,) if forward else (Work.BACKWARD, Work.INPUT)
    return any(Action(kind, source, microbatch) in done for kind in kinds)
