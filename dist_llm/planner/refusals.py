"""What to say when there is no plan: which setting, why, and the nearest that there is a plan for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

from dist_llm.config.checks import OF_THIS_MACHINE, RULES, check
from dist_llm.config.request import PlanRequest
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.ranking import FULL, Ranking, holds
from dist_llm.planner.shapes import Shape
from dist_llm.planner.spending import Spending

MOST_NODES = 2**14
MOST_DAYS = 3653.0
"""A plan that takes longer than ten years is none."""

DraftOf = Callable[[float], RunConfig]
"""The run, not yet split, of so many training FLOPs."""


def refuse_budget(given: Mapping[str, float]) -> ConfigError:
    """Return the error of a request with no budget, or with several."""
    if not given:
        rule = "must be given, or budget.gpu_hours or budget.usd: a plan starts from what may be spent"
        return ConfigError([Violation("budget.flops", None, rule, (1e21,))])
    names = " and ".join(f"budget.{name}" for name in given)
    return ConfigError(
        [Violation(f"budget.{name}", value, f"is one of {names}: give one") for name, value in given.items()]
    )


def refuse_years(request: PlanRequest, days: float, flops: float, draft_of: DraftOf) -> ConfigError:
    """Return the error of a plan that takes too long on the nodes there are, with nodes and a budget that do not."""
    nodes, times = request.cluster.nodes or 1, days / MOST_DAYS
    rule = f"would take about {days:,.0f} days, and {MOST_DAYS / 365.25:.0f} years are the most that is planned"
    enough = (n for n in _doubled(nodes) if n >= 1.2 * nodes * times)
    violations = [Violation("cluster.nodes", nodes, rule, _holding(draft_of(flops), enough))]
    return ConfigError([*violations, *_smaller(request, 0.7 * flops / times, draft_of)])


def refuse_failures(request: PlanRequest, spending: Spending) -> ConfigError:
    """Return the error of a cluster that fails more often than it trains."""
    cluster, goodput = request.cluster, spending.reliability.goodput
    rule = (
        f"lets {spending.devices} devices fail every {spending.reliability.job_mtbf_hours:.2g} hours: "
        f"steps would advance in {goodput:.2g} of the time"
    )
    enough = float(f"{20 * spending.devices * (spending.save_seconds + spending.restart_seconds) / 3600:.1g}")
    return ConfigError([Violation("cluster.mtbf_device_hours", cluster.mtbf_device_hours, rule, (enough,))])


def refuse_batch(request: PlanRequest, draft: RunConfig, devices: int) -> ConfigError:
    """Return the error of a run that has no layout: rules that it breaks on any, or a batch for fewer devices."""
    elsewhere = {slip.words for rule in RULES if rule.name in OF_THIS_MACHINE for slip in rule(draft, None)}
    if broken := [violation for violation in check(draft, None) if violation.rule not in elsewhere]:
        return ConfigError(broken)
    nodes, sequences = request.cluster.nodes or 1, draft.data.global_batch
    rule = f"has {devices} devices, and a batch of {sequences} sequences can be dealt to so many in no layout"
    fewer = (nodes // 2,) if nodes > 1 else ()
    larger = -(-sequences // devices) * devices
    return ConfigError(
        [
            Violation("cluster.nodes", nodes, rule, fewer),
            Violation("data.global_batch", sequences, "or take a batch that they divide", (larger,)),
        ]
    )


def refuse_memory(request: PlanRequest, shape: Shape, ranking: Ranking, draft_of: DraftOf) -> ConfigError:
    """Return the error of a model that fits nowhere, with nodes that hold it and a budget whose model fits here."""
    least = ranking.too_large
    assert least is not None
    limit, nodes = FULL * request.cluster.memory_gib, request.cluster.nodes or 1
    rule = (
        f"holds no layout of {shape.num_params:.3g} parameters: the smallest of {ranking.proposed} ({least.name}) "
        f"needs {least.peak_gib:.1f} of {limit:.1f} GiB a device, most of it {least.memory.largest}"
    )
    violations = [Violation("cluster.nodes", nodes, rule, _holding(least.config, _doubled(nodes)))]
    flops = request.budget.flops
    return ConfigError([*violations, *(_smaller(request, flops / 2, draft_of) if flops else ())])


def _holding(draft: RunConfig, nodes: Iterable[int]) -> tuple[int, ...]:
    """Return the first of these numbers of nodes that holds a run, if any does."""
    each = draft.launcher.nproc
    return tuple(islice((n for n in nodes if holds(draft, n * each)), 1))


def _smaller(request: PlanRequest, most: float, draft_of: DraftOf) -> list[Violation]:
    """Return the largest budget that the nodes hold a model of, halved from `most` on; nothing for a given model."""
    if request.budget.flops is None or request.preset is not None:
        return []
    try:
        for times in range(40):
            flops = float(f"{most / 2**times:.2g}")
            draft = draft_of(flops)
            if holds(draft, draft.launcher.nproc * draft.launcher.nodes):
                rule = "or take a smaller budget, and so a smaller model"
                return [Violation("budget.flops", request.budget.flops, rule, (flops,))]
    except ConfigError:
        pass  # so small a budget has no model
    return []


def _doubled(nodes: int) -> Iterator[int]:
    """Yield the powers of two above a number of nodes, as far as clusters go."""
    more = 1
    while more <= MOST_NODES:
        if more > nodes:
            yield more
        more *= 2
