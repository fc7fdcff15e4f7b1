"""What to say when there is no plan: which setting, why, and the nearest that there is a plan for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from dist_llm.config.checks import OF_THIS_MACHINE, RULES, check
from dist_llm.config.request import PlanRequest
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.ranking import FULL, Ranking, holds
from dist_llm.planner.shapes import Shape
from dist_llm.planner.spending import Spending

MOST_NODES = 2**14


def refuse_budget(given: Mapping[str, float]) -> ConfigError:
    """Return the error of a request with no budget, or with several."""
    if not given:
        rule = "must be given, or budget.gpu_hours or budget.usd: a plan starts from what may be spent"
        return ConfigError([Violation("budget.flops", None, rule, (1e21,))])
    names = " and ".join(f"budget.{name}" for name in given)
    return ConfigError(
        [Violation(f"budget.{name}", value, f"is one of {names}: give one") for name, value in given.items()]
    )


def refuse_years(request: PlanRequest, days: float, most_days: float, flops: float) -> ConfigError:
    """Return the error of a plan that takes too long on the nodes there are."""
    nodes = request.cluster.nodes or 1
    times = days / most_days
    rule = f"would take about {days:,.0f} days, and {most_days / 365.25:.0f} years are the most that is planned"
    more = next((n for n in _doubled(nodes) if n >= 1.2 * nodes * times), None)
    violations = [Violation("cluster.nodes", nodes, rule, () if more is None else (more,))]
    return ConfigError([*violations, *_less(request, float(f"{0.7 * flops / times:.2g}"))])


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


def refuse_memory(
    request: PlanRequest, shape: Shape, ranking: Ranking, draft_of: Callable[[float], RunConfig]
) -> ConfigError:
    """Return the error of a model that fits nowhere, with the nodes that hold it and the budget that these hold.

    draft_of: the run, not yet split, of so many training FLOPs.
    """
    least = ranking.too_large
    assert least is not None
    limit, nodes = FULL * request.cluster.memory_gib, request.cluster.nodes or 1
    rule = (
        f"holds no layout of {shape.num_params:.3g} parameters: the smallest of {ranking.proposed} ({least.name}) "
        f"needs {least.peak_gib:.1f} of {limit:.1f} GiB a device, most of it {least.memory.largest}"
    )
    each = least.config.launcher.nproc
    more = next((n for n in _doubled(nodes) if holds(least.config, n * each)), None)
    violations = [Violation("cluster.nodes", nodes, rule, () if more is None else (more,))]
    flops = request.budget.flops
    if flops is not None and request.preset is None:
        halves = (float(f"{flops / 2**times:.2g}") for times in range(1, 40))
        try:
            less = next((half for half in halves if holds(draft_of(half), nodes * each)), None)
        except ConfigError:  # so small a budget has no model
            less = None
        violations += _less(request, less) if less is not None else []
    return ConfigError(violations)


def _doubled(nodes: int) -> Iterator[int]:
    """Yield the powers of two above a number of nodes, as far as clusters go."""
    more = 1
    while more <= MOST_NODES:
        if more > nodes:
            yield more
        more *= 2


def _less(request: PlanRequest, flops: float) -> list[Violation]:
    if request.budget.flops is None:
        return []
    rule = "or take a smaller budget, and so a smaller model"
    return [Violation("budget.flops", request.budget.flops, rule, (flops,))]
