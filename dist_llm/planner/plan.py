"""From a budget to a plan: FLOPs -> parameters and tokens -> shape -> batch -> layout -> time, money, interruptions.

A budget of device-hours or money is one of FLOPs at the utilisation that the plan itself reaches: planned, measured
against the budget, and planned again until the two agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice

from dist_llm.config.request import BudgetRequest, PlanRequest
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.batch_laws import Recommendation
from dist_llm.planner.cures import NoPlan, cured
from dist_llm.planner.law_file import find_law
from dist_llm.planner.laws import Law, Optimum
from dist_llm.planner.outline import Outline, least_flops, machines_of, outline, peak_flops_per_second
from dist_llm.planner.ranking import Ranked, Ranking, rank_in_turn, rank_layouts
from dist_llm.planner.refusals import (
    LEAST_GOODPUT,
    MOST_DAYS,
    refuse_budget,
    refuse_failures,
    refuse_hours,
    refuse_little,
    refuse_machines,
    refuse_memory,
    refuse_unspent,
    refuse_years,
)
from dist_llm.planner.shapes import Shape
from dist_llm.planner.sizing import Size, compared_laws
from dist_llm.planner.spending import Spending, spend

CLOSE = 0.01
"""Part of a budget of device-hours or money that may be left over; none is overdrawn."""

MOST_ROUNDS, FEW_ROUNDS = 12, 8
"""Guesses at the FLOPs of a budget of device-hours, and those with which one is tried that a refusal might propose."""

MOST_REFUSALS = 3
"""Guesses without a plan after which the search for device-hours starts from the smallest plan there is."""

MOST_UNSPENT = 4
"""A budget of so many times what the largest plan takes is refused."""

LEAST_ROUNDS, LEAST_STEPS = 18, (1.6, 1.2, 1.07, 1.02)
"""Budgets, each four times the last, that a first plan is looked for at, and ratios of those tried about it."""


@dataclass(frozen=True)
class Plan:
    """A plan, and what it was chosen from. config: with the best layout; it trains."""

    request: PlanRequest
    law: Law
    flops: float
    size: Size
    compared: tuple[tuple[Law, Optimum], ...]
    shapes: tuple[Shape, ...]
    batch: Recommendation
    steps: int
    ranking: Ranking
    spending: Spending
    config: RunConfig

    @property
    def shape(self) -> Shape:
        """The chosen shape."""
        return self.shapes[0]

    @property
    def best(self) -> Ranked:
        """The fastest layout that fits."""
        return self.ranking.fitting[0]

    @property
    def tokens(self) -> int:
        """Tokens that the steps train on."""
        data = self.config.data
        return self.steps * data.global_batch * data.seq_len

    @property
    def nodes(self) -> int:
        """Nodes that it runs on, of one or several hosts each."""
        return machines_of(self.request)[0]


def make_plan(request: PlanRequest, law: Law) -> Plan:
    """Return the plan of a request. Raises ConfigError with what cannot be, and changes of it that were tried."""
    try:
        return _planned(request, law)
    except ConfigError as error:
        raise cured(request, error, partial(_has_plan, {request.law: law})) from None


def check_request(request: PlanRequest) -> list[Violation]:
    """Return what is wrong with a request before anything is planned."""
    given = {name: value for name, value in request.budget.model_dump().items() if value is not None}
    return [*refuse_budget(given), *refuse_machines(request)]


def _planned(request: PlanRequest, law: Law) -> Plan:
    if broken := check_request(request):
        raise NoPlan(broken)
    if request.budget.flops is not None:
        return _plan_flops(request, law, request.budget.flops)
    return _plan_hours(request, law)


def _has_plan(laws: Mapping[str, Law], request: PlanRequest, until: float) -> bool:
    """Return whether make_plan would: of layouts that fit it asks for one, not for the fastest.

    until: process time after which a search for device-hours is given up.
    """
    with suppress(ConfigError):
        law = laws.get(request.law) or find_law(request.law)
        if check_request(request):
            return False
        if request.budget.flops is None:
            return bool(_plan_hours(request, law, until))
        found = outline(request, law, request.budget.flops)
        spent = (_spending(found, each) for each in rank_in_turn(found.draft, found.machines[1], found.pins))
        return any(each.reliability.goodput >= LEAST_GOODPUT and each.days <= MOST_DAYS for each in spent)
    return False


def _budget_hours(request: PlanRequest) -> float:
    """Return the device-hours of a budget of hours or money, which must not outlast what is planned."""
    cluster, hours = request.cluster, request.budget.gpu_hours
    if hours is None:
        if not cluster.usd_per_device_hour:
            rule = "needs a price: set cluster.usd_per_device_hour"
            raise NoPlan([Violation("budget.usd", request.budget.usd, rule)])
        hours = float(request.budget.usd or 0) / cluster.usd_per_device_hour
    devices = machines_of(request)[1]
    if hours > MOST_DAYS * 24 * devices:
        raise refuse_hours(request, hours / (24 * devices))
    return hours


def _plan_hours(request: PlanRequest, law: Law, until: float = math.inf) -> Plan:
    """Return a plan whose device-hours are the budget's; where shapes leave a gap there, the nearest below.

    until: process time after which the search is given up; with one, the first plan will do that the budget pays for.
    """
    first = until < math.inf
    hours = _budget_hours(request)
    flops, aim = hours * 3600 * peak_flops_per_second(request) * 0.4, hours * (1 - CLOSE / 2)
    low, high, slope, before = 0.0, math.inf, 1.0, None
    best: Plan | None = None
    refusals: list[tuple[float, NoPlan]] = []
    for _ in range(FEW_ROUNDS if first else MOST_ROUNDS):
        if time.process_time() > until:
            raise NoPlan([])
        try:
            plan = _plan_flops(request, law, flops, brief=True)
        except NoPlan as error:
            # A guess may be more than there is a plan for, and the budget itself be less.
            if best is None and refusals and _same_layout(refusals[-1][1], error):
                raise
            refusals.append((flops, error))
            high = high if error.too_little else min(high, flops)
            if best is None and (error.too_little or len(refusals) >= MOST_REFUSALS):
                best = _least_plan(request, law, hours, until) or _plan_flops(request, law, refusals[0][0], first)
                low, high = best.flops, high if high > best.flops else math.inf
            guess = low * aim / _device_hours(best) if best else flops / 3
            flops = guess if low < guess < high else math.sqrt(low * high)
        else:
            apart = aim / plan.spending.device_hours
            if apart >= 1 - CLOSE / 2:
                low, best = flops, max(best or plan, plan, key=_device_hours)
            else:
                high = flops
            if abs(apart - 1) <= CLOSE / 2:
                break
            if before is not None and before[0] != flops:
                # Larger models use devices better: hours grow as a power of FLOPs.
                slope = min(1.2, max(0.3, math.log(before[1] / apart) / math.log(flops / before[0])))
            before = (flops, apart)
            guess = flops * apart ** (1 / slope)
            flops = guess if low < guess < high else math.sqrt(low * high)
        if high < (1 + CLOSE / 2) * low or (first and best and MOST_UNSPENT * best.spending.device_hours >= hours):
            break
    best = best or _least_plan(request, law, hours, until)
    if best is None:
        raise refusals[0][1] if refusals else _too_few_hours(request, plan, hours)
    if (refusals or first) and MOST_UNSPENT * best.spending.device_hours < hours:
        try:
            plan = _plan_flops(request, law, refusals[0][0] if refusals else math.inf, first)
        except NoPlan as error:
            raise refuse_unspent(request, error, best.spending.device_hours / hours) from None
    return best


def _too_few_hours(request: PlanRequest, least: Plan, hours: float) -> NoPlan:
    needed = least.spending.device_hours
    return refuse_little(request, f"the smallest plan found takes {needed:.3g} device-hours", needed / hours)


def _device_hours(plan: Plan) -> float:
    return plan.spending.device_hours


def _same_layout(before: NoPlan, error: NoPlan) -> bool:
    """Return whether what is fixed of the layout is refused again, and alone: no other budget helps."""
    again = {violation.key for violation in error.violations}
    parts = {key.partition(".")[0] for key in again}
    return parts <= {"parallel"} and again == {each.key for each in before.violations}


def _least_plan(request: PlanRequest, law: Law, hours: float, until: float) -> Plan | None:
    """Return a plan of at most so many hours, None if none of any is found. Raises NoPlan with the hours of the least.

    Budgets grow from the smallest that the law has a model for until there is a plan; then, about it, ever more finely.
    """
    low = least_flops(law)
    found = list(islice(_plans_at(request, law, (low * 4.0**times for times in range(LEAST_ROUNDS)), until), 1))
    for step in LEAST_STEPS:
        if not found:
            return None
        least = min(found, key=_device_hours)
        if least.spending.device_hours <= hours:
            return least
        found += _plans_at(request, law, (least.flops * step**times for times in (-3, -2, -1, 1, 2, 3)), until)
    least = min(found, key=_device_hours)
    if least.spending.device_hours > hours:
        raise _too_few_hours(request, least, hours)
    return least


def _plans_at(request: PlanRequest, law: Law, budgets: Iterable[float], until: float) -> Iterator[Plan]:
    """Yield the plans that there are of some budgets of FLOPs."""
    for flops in budgets:
        if time.process_time() > until:
            return
        if plan := _plan_at(request.model_copy(update={"budget": BudgetRequest(flops=1.0)}), law, flops):
            yield replace(plan, request=request)


@lru_cache(maxsize=128)
def _plan_at(request: PlanRequest, law: Law, flops: float) -> Plan | None:
    """Return the plan of some FLOPs whatever the budget, for the smallest of it are the same for all."""
    with suppress(NoPlan):
        return _plan_flops(request, law, flops, brief=True)
    return None


def _plan_flops(request: PlanRequest, law: Law, flops: float, brief: bool = False) -> Plan:
    """Return the plan of so many training FLOPs. brief: of a model that does not fit not all is said, but sooner."""
    found = outline(request, law, flops)
    ranking = rank_layouts(found.draft, found.machines[1], found.pins, brief)
    if not ranking.fitting:
        raise refuse_memory(request, ranking) if ranking.too_large else NoPlan([Violation("model", None, "fits not")])
    best = ranking.fitting[0]
    spending = _spending(found, best)
    if spending.reliability.goodput < LEAST_GOODPUT:
        raise refuse_failures(request, spending)
    if spending.days > MOST_DAYS:
        raise refuse_years(request, spending.days)
    config, compared = _with_checkpoints(best, spending), tuple(compared_laws(law, flops))
    size, steps = found.size, found.draft.run.steps
    return Plan(request, law, flops, size, compared, found.shapes, found.batch, steps, ranking, spending, config)


def _spending(found: Outline, layout: Ranked) -> Spending:
    """Return what the steps of a layout take."""
    nodes, devices = found.machines
    work = found.draft.run.steps * layout.step.seconds
    return spend(found.request.cluster, devices, nodes, found.shapes[0].num_params, work)


def _with_checkpoints(best: Ranked, spending: Spending) -> RunConfig:
    """Return the config of the best layout, saving at Daly's interval."""
    steps = round(spending.reliability.checkpoint_interval_seconds / best.step.seconds)
    interval = min(max(1, steps), best.config.run.steps)
    checkpoint = best.config.checkpoint.model_copy(update={"interval": interval})
    return best.config.model_copy(update={"checkpoint": checkpoint})
