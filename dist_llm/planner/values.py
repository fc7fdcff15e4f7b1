"""Other values of a request's settings, the nearest first: what may be tried where there is no plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from dist_llm.config.parallel import Schedule
from dist_llm.config.request import PlanRequest
from dist_llm.config.rules import divisors
from dist_llm.planner.cost.step import node_devices
from dist_llm.planner.pins import key_of, pins_of

MOST_NODES = 2**14
MOST_VALUES = 8
"""Other values of a setting of the layout."""

FIXED_SHAPE = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
"""Settings of the model that a search else finds."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule": get_args(Schedule),
    "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"),
    "sequence": (True, False),
    "virtual_pipeline": tuple(range(1, 9)),
    "microbatch": tuple(2**power for power in range(8)),
}


def budget_of(request: PlanRequest) -> tuple[str, float]:
    """Return the key of the budget that is given, and how much it is."""
    given = request.budget.model_dump().items()
    return next((f"budget.{name}", float(value)) for name, value in given if value is not None)


def rounded(numbers: Iterable[float]) -> tuple[float, ...]:
    """Return numbers in two digits."""
    return tuple(dict.fromkeys(float(f"{number:.2g}") for number in numbers))


def given_settings(request: PlanRequest) -> list[str]:
    """Return the keys of what a request fixes and may leave free."""
    keys = [key_of(name) for name in pins_of(request).values]
    data = ("global_batch", "seq_len", "tokens")
    keys += [f"data.{name}" for name in data if getattr(request.data, name) is not None]
    if request.preset is None:
        keys += [f"model.{name}" for name in FIXED_SHAPE if getattr(request.model, name) is not None]
    return keys


def last_resorts(request: PlanRequest) -> list[str]:
    """Return the keys of what is changed only if nothing else helps."""
    budgets = [f"budget.{name}" for name, value in request.budget.model_dump().items() if value is not None]
    return ["cluster.nodes", *budgets[:1], "cluster.memory_gib"]


def nearby(request: PlanRequest, key: str) -> Iterator[Any]:
    """Yield other values of a setting, the nearest first; null last, where it may be left free."""
    section, _, name = key.partition(".")
    if section == "parallel" or name == "microbatch":
        yield from _layout_values(request, name)
    elif section == "budget":
        yield from rounded(budget_of(request)[1] * 10.0**power for power in (-0.3, 0.3, -1, 1, -2, 2, -3, 3, -5, 5))
    elif key == "cluster.nodes":
        nodes = request.cluster.nodes or 1
        yield from _alternating(fewer_nodes(nodes), more_nodes(nodes))
    elif key == "cluster.memory_gib":
        yield from (math.ceil(request.cluster.memory_gib * times) for times in (1.5, 2, 3, 4, 6, 8, 16, 32, 128))
    elif key == "data.global_batch":
        yield from batches(request)
        yield None
    elif key == "data.seq_len":
        yield from shorter(request.data.seq_len or 0)
        yield None
    elif key == "data.tokens":
        yield from more_text(request)
        yield None
    else:
        yield None


def more_nodes(nodes: int, least: float = 1.0) -> Iterator[int]:
    """Yield the powers of two above a number of nodes, from so many times it, as far as clusters go."""
    more = 1
    while more <= MOST_NODES:
        if more > nodes and more >= least * nodes:
            yield more
        more *= 2


def fewer_nodes(nodes: int) -> Iterator[int]:
    """Yield a number of nodes halved until it is one."""
    yield from (nodes >> times for times in range(1, nodes.bit_length()))


def shorter(length: int) -> tuple[int, ...]:
    """Return the powers of two below a length, down to 16."""
    return tuple(2**power for power in range((length - 1).bit_length() - 1, 3, -1)) if length > 16 else ()


def batches(request: PlanRequest) -> tuple[int, ...]:
    """Return other batches: those that more or fewer of the devices divide, and powers of two about it."""
    asked = request.data.global_batch or 1
    unit = (request.parallel.data or 1) * (request.data.microbatch or 1)
    devices = (request.cluster.nodes or 1) * node_devices(request.cluster)
    shares = [unit * ranks for ranks in divisors(devices)]
    dealt = {-(-asked // share) * share for share in shares} | {asked // share * share for share in shares}
    doubled = {unit * max(1, round(asked / unit * 2.0**power)) for power in range(-16, 17, 2)}
    nearest = sorted((dealt | doubled) - {0, asked}, key=lambda batch: _apart(asked, batch))
    return tuple(batch for batch in nearest if batch < 2**31)[:24]


def more_text(request: PlanRequest) -> tuple[float, ...]:
    """Return more tokens than there are."""
    return rounded(
        (request.data.tokens or 1.0) * 2.0**times for times in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
    )


def _layout_values(request: PlanRequest, name: str) -> tuple[Any, ...]:
    """Return other values of a setting of the layout, of numbers those of the nearest ratio."""
    now = pins_of(request).values.get(name)
    if name in CHOICES:
        others = [value for value in CHOICES[name] if value != now]
    else:
        devices = (request.cluster.nodes or 1) * node_devices(request.cluster)
        whole = request.model.moe.num_experts if request.preset is None else request.preset.moe.num_experts
        others = [value for value in divisors((whole or 1) if name == "expert" else devices) if value != now]
    if type(now) is int and now > 0:
        others.sort(key=lambda value: (_apart(now, value) if value else math.inf, value))
    return tuple(others[:MOST_VALUES])


def _apart(one: int, other: int) -> float:
    return abs(math.log(other / one))


def _alternating(first: Iterable[int], second: Iterable[int]) -> Iterator[int]:
    """Yield of two in turn, and the rest of the longer."""
    one, two = list(first), list(second)
    for index in range(max(len(one), len(two))):
        yield from one[index : index + 1]
        yield from two[index : index + 1]
