"""What to say when there is no plan: which setting, why, and what may mend it; cures.py proposes of it what does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dist_llm.accounting.params import num_parameters
from dist_llm.config.checks import OF_THIS_MACHINE, RULES, check
from dist_llm.config.operations import LauncherConfig
from dist_llm.config.request import PlanRequest
from dist_llm.config.rules import divisors
from dist_llm.config.run import RunConfig
from dist_llm.errors import Violation
from dist_llm.planner.cost.step import node_devices
from dist_llm.planner.cures import NoPlan
from dist_llm.planner.pins import broken_rules, key_of, pins_of, undivided
from dist_llm.planner.ranking import FULL, Ranking
from dist_llm.planner.shapes import MOST_LAYERS
from dist_llm.planner.sizing import Size
from dist_llm.planner.spending import Spending
from dist_llm.planner.values import (
    FIXED_SHAPE,
    MOST_NODES,
    batches,
    budget_of,
    fewer_nodes,
    more_nodes,
    more_text,
    nearby,
    rounded,
    shorter,
)

MOST_STEPS = 2**31 - 1
FEWEST_STEPS = 10
"""A run of fewer steps is none, and its tokens could not be rounded to whole ones."""

LARGEST_PARAMS = 1e12
"""Parameters for which there are shapes, whatever the vocabulary."""

MOST_DAYS = 3653.0
"""A plan that takes longer than ten years is none."""

LEAST_GOODPUT = 0.5
"""Below it failures, not work, are what takes the time."""


def refuse_budget(given: Mapping[str, float]) -> Iterator[Violation]:
    """Yield what is wrong with a request that has no budget, or several."""
    if not given:
        rule = "must be given, or budget.gpu_hours or budget.usd: a plan starts from what may be spent"
        yield Violation("budget.flops", None, rule, tuple(10.0**power for power in range(21, 12, -1)))
    if len(given) > 1:
        names = " and ".join(f"budget.{name}" for name in given)
        for name, value in given.items():
            yield Violation(f"budget.{name}", value, f"is one of {names}: give one")


def refuse_machines(request: PlanRequest) -> Iterator[Violation]:
    """Yield what of the machines no launcher starts ranks on."""
    nodes, each = request.cluster.nodes or 1, node_devices(request.cluster)
    host = request.cluster.devices_per_host or each
    if each % host:
        rule = f"must divide the {each} devices of a node"
        yield Violation("cluster.devices_per_host", host, rule, tuple(n for n in divisors(each) if n <= host)[::-1])
    bounds = LauncherConfig.model_fields["nodes"].metadata
    most = next(bound.le for bound in bounds if hasattr(bound, "le")) // max(1, each // host)
    if nodes > most:
        yield Violation("cluster.nodes", nodes, f"must be at most {most}", (most, *fewer_nodes(2 * MOST_NODES)))
    if (hosts := nodes * each // host) > 1 and request.launcher == "local":
        yield Violation("launcher", "local", f"starts ranks on one host, and there are {hosts}", ("slurm",))


def refuse_years(request: PlanRequest, days: float) -> NoPlan:
    """Return the error of a plan that takes too long on the nodes there are; what its layout breaks is said too."""
    nodes, times = request.cluster.nodes or 1, days / MOST_DAYS
    rule = f"would take about {days:,.0f} days, and {MOST_DAYS / 365.25:.0f} years are the most that is planned"
    key, budget = budget_of(request)
    near = rounded(0.7 * budget / times / 2.0 ** (power**1.5) for power in range(12))
    more = tuple(more_nodes(nodes, times))
    slips = early_slips(request)
    return NoPlan(
        [*slips, Violation("cluster.nodes", nodes, rule, more)],
        instead=[Violation(key, budget, "or take a smaller budget, and so a smaller model", near)],
    )


def refuse_hours(request: PlanRequest, days: float) -> NoPlan:
    """Return the error of device-hours, or money, that the nodes there are do not use up in time."""
    key, budget = budget_of(request)
    nodes, times = request.cluster.nodes or 1, days / MOST_DAYS
    rule = f"lasts {days:,.0f} days on {nodes} nodes, and {MOST_DAYS / 365.25:.0f} years are the most that is planned"
    near = rounded(0.95 * budget / times / 2.0 ** (power**1.5) for power in range(8))
    enough = math.ceil(1.1 * nodes * times)
    more = (enough, *more_nodes(nodes, times)) if enough <= MOST_NODES else ()
    return NoPlan(
        [Violation(key, budget, rule, near)], instead=[Violation("cluster.nodes", nodes, "or take more", more)]
    )


def refuse_failures(request: PlanRequest, spending: Spending) -> NoPlan:
    """Return the error of a cluster that fails more often than it trains."""
    cluster, goodput = request.cluster, spending.reliability.goodput
    rule = (
        f"lets {spending.devices} devices fail every {spending.reliability.job_mtbf_hours:.2g} hours: "
        f"steps would advance in {goodput:.2g} of the time"
    )
    enough = 20 * spending.devices * (spending.save_seconds + spending.restart_seconds) / 3600
    near = rounded(enough * times for times in (1, 2, 5, 10))
    return NoPlan([Violation("cluster.mtbf_device_hours", cluster.mtbf_device_hours, rule, near)])


def refuse_little(request: PlanRequest, why: str, least: float) -> NoPlan:
    """Return the error of a budget that trains nothing, which takes `least` of what it has at the least."""
    key, budget = budget_of(request)
    near = rounded(budget * least * times for times in (1.05, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 1e3, 1e4))
    return NoPlan([Violation(key, budget, f"is too little to train anything: {why}", near)], too_little=True)


def refuse_unspent(request: PlanRequest, error: NoPlan, share: float) -> NoPlan:
    """Return the error of a budget that is more than there is a plan for, of which one uses this share."""
    key, budget = budget_of(request)
    near = rounded(budget * share * times for times in (1.02, 1.1, 1.3, 2))
    smaller = Violation(key, budget, "or take a smaller budget, and so a smaller model", near)
    instead = [each for each in error.instead if each.key != key]
    return NoPlan(error.violations, error.suspects, [*instead, smaller])


def refuse_text(request: PlanRequest, num_params: float, fewest: float) -> NoPlan:
    """Return the error of text so little that the model of it is too small to be searched."""
    rule = f"feeds {num_params:.2g} parameters, and {fewest:.2g} are the fewest that are planned"
    return NoPlan([Violation("data.tokens", request.data.tokens, rule, more_text(request))])


def refuse_repetition(request: PlanRequest, size: Size, guess: float) -> NoPlan:
    """Return the error of text repeated so often that the law foretells less than a guess, with text enough."""
    rule = f"would be seen {size.epochs:.3g} times, at a loss of {size.loss:.4g}: a guess has {guess:.3g} nats a token"
    return NoPlan([Violation("data.tokens", request.data.tokens, rule, more_text(request))])


def refuse_batch(request: PlanRequest, draft: RunConfig, devices: int) -> NoPlan:
    """Return the error of a run that has no layout: rules that it breaks on any, or a batch for fewer devices."""
    elsewhere = {slip.words for rule in RULES if rule.name in OF_THIS_MACHINE for slip in rule(draft, None)}
    if broken := [violation for violation in check(draft, None) if violation.rule not in elsewhere]:
        return NoPlan([_as_requested(violation) for violation in broken])
    nodes, sequences, pins = request.cluster.nodes or 1, draft.data.global_batch, pins_of(request)
    rule = f"leaves no layout of {sequences} sequences of {draft.data.seq_len} tokens on {devices} devices"
    broken_by = broken_rules(draft, devices, pins)
    suspects = _pin_suspects(request, rule, broken_by)
    if broken_by:
        why = [suspect for suspect in suspects if suspect.rule != rule]
    else:
        rule = f"has {devices} devices, and a batch of {sequences} sequences can be dealt to so many in no layout"
        why = [Violation("cluster.nodes", nodes, rule, tuple(fewer_nodes(nodes)))]
    larger = tuple(batch for batch in batches(_with_batch(request, sequences)) if batch > sequences)
    key, budget = budget_of(request)
    instead = [
        Violation("data.global_batch", sequences, "or take a batch that they divide", larger),
        Violation(key, budget, "or spend more", rounded(budget * 10.0 ** (power / 2) for power in range(1, 9))),
    ]
    return NoPlan(why, suspects, instead)


def _pin_suspects(request: PlanRequest, rule: str, broken: Mapping[str, str]) -> list[Violation]:
    """Return what is fixed of the layout, with the rule of layouts that it breaks, as what may be to blame."""
    return [
        Violation(
            key_of(name),
            value,
            f"{rule}: {broken[name]}" if name in broken else rule,
            tuple(nearby(request, key_of(name))),
        )
        for name, value in pins_of(request).values.items()
    ]


def _with_batch(request: PlanRequest, sequences: int) -> PlanRequest:
    return request.model_copy(update={"data": request.data.model_copy(update={"global_batch": sequences})})


def _as_requested(violation: Violation) -> Violation:
    """Return a violation by the key that a request has for it: `engine` for `engine.name`."""
    return replace(violation, key=violation.key.removesuffix(".name"))


def refuse_steps(request: PlanRequest, draft: RunConfig, tokens: float) -> NoPlan:
    """Return the error of a batch that is nearly all there is to train on."""
    data = draft.data
    rule = f"makes steps of {data.global_batch * data.seq_len:,} tokens, and the budget trains on {tokens:,.0f}"
    key, budget = budget_of(request)
    times = FEWEST_STEPS * data.global_batch * data.seq_len / tokens
    enough = budget * times ** (2 if request.preset is None else 1)
    more = rounded(enough * times for times in (1.2, 2, 5, 20, 100, 1000))
    if request.data.seq_len is not None and FEWEST_STEPS * data.seq_len > tokens:
        first = Violation("data.seq_len", data.seq_len, rule, shorter(data.seq_len))
    elif request.data.global_batch is not None:
        unit = (request.parallel.data or 1) * (request.data.microbatch or 1)
        fitting = max(1.0, tokens / data.seq_len / 1000 / unit)
        powers = range(math.floor(math.log2(fitting)), -1, -1)
        first = Violation("data.global_batch", data.global_batch, rule, tuple(unit * 2**power for power in powers))
    else:
        return NoPlan([Violation(key, budget, rule, more)], too_little=True)
    return NoPlan([first], instead=[Violation(key, budget, "or spend more", more)], too_little=True)


def refuse_shapes(request: PlanRequest, num_params: float) -> NoPlan:
    """Return the error of a request that fixes so much of the model, or asks for so large a one, that none is left."""
    rule = (
        f"leaves no shape of about {num_params:.3g} parameters: of at most {MOST_LAYERS} layers, "
        "key heads that divide the others, heads of even width"
    )
    fixed = {name: getattr(request.model, name) for name in FIXED_SHAPE if getattr(request.model, name) is not None}
    suspects = [Violation(f"model.{name}", value, rule, (None,)) for name, value in fixed.items()]
    if (tensor := request.parallel.tensor or 1) > 1:
        others = tuple(n for n in divisors(node_devices(request.cluster))[::-1] if n != tensor)
        suspects.insert(0, Violation("parallel.tensor", tensor, f"{rule}, split over so many", others))
    key, budget = budget_of(request)
    near = rounded(budget * min(0.5, (LARGEST_PARAMS / num_params) ** 2) / 4.0**power for power in range(6))
    smaller = Violation(key, budget, "or take a smaller budget, and so a smaller model", near)
    if fixed:
        return NoPlan([each for each in suspects if each.key != "parallel.tensor"], suspects, [smaller])
    return NoPlan([Violation(key, budget, rule, near)], suspects)


def refuse_batch_of(request: PlanRequest, sequences: int, steps: int) -> NoPlan:
    """Return the error of a batch so small that its steps cannot be counted."""
    rule = f"makes {steps:,} steps, and {MOST_STEPS:,} are the most of a run"
    enough = 2 ** math.ceil(math.log2(sequences * steps / MOST_STEPS))
    near = tuple(enough * 2**power for power in range(12))
    return NoPlan([Violation("data.global_batch", sequences, rule, near)])


def refuse_memory(request: PlanRequest, ranking: Ranking) -> NoPlan:
    """Return the error of a model that fits nowhere, with nodes that may hold it, and what may fit here."""
    least = ranking.too_large
    assert least is not None
    limit, nodes = FULL * request.cluster.memory_gib, request.cluster.nodes or 1
    needs = f"needs {least.peak_gib:.1f} of {limit:.1f} GiB a device"
    rule = (
        f"holds no layout of {num_parameters(least.config.model):.3g} parameters: the smallest of {ranking.proposed} "
        f"({least.name}) {needs}, most of it {least.memory.largest}"
    )
    suspects = _pin_suspects(request, f"leaves no layout that fits: the smallest ({least.name}) {needs}", {})
    why = [Violation("cluster.nodes", nodes, rule, tuple(more_nodes(nodes)))]
    key, budget = budget_of(request)
    instead: list[Violation] = []
    if (length := request.data.seq_len) is not None:
        instead.append(Violation("data.seq_len", length, "or train on shorter sequences", shorter(length)))
    if request.preset is None:
        near = rounded(budget / 2.0 ** (power**1.25) for power in range(1, 20))
        instead.append(Violation(key, budget, "or take a smaller budget, and so a smaller model", near))
    return NoPlan(why, suspects, instead)


def early_slips(request: PlanRequest) -> list[Violation]:
    """Return what is fixed of the layout and no run of the request has, whatever its size."""
    devices, pins = (request.cluster.nodes or 1) * node_devices(request.cluster), pins_of(request)
    slips = undivided(pins, devices)
    experts = (request.model if request.preset is None else request.preset).moe.num_experts
    if pins.values.get("expert", 1) > 1 and not experts:
        slips["expert"] = "must be 1 without model.moe.num_experts"
    rule = f"leaves no layout on {devices} devices"
    return [each for each in _pin_suspects(request, rule, slips) if each.rule != rule]
