"""From a budget to a plan: FLOPs -> parameters and tokens -> shape -> batch -> layout -> time, money, interruptions.

A budget of device-hours or money is one of FLOPs at the utilisation that the plan itself reaches: planned, measured
against the budget, and planned again until the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from dist_llm.config.request import PlanRequest
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.batch_laws import Recommendation, recommend
from dist_llm.planner.cost.step import node_devices
from dist_llm.planner.draft import draft_config, warmup_steps
from dist_llm.planner.laws import Law, Optimum, ParametricLaw
from dist_llm.planner.pins import filled_sequences, pins_of
from dist_llm.planner.published_laws import DEFAULT_LAW
from dist_llm.planner.ranking import Ranked, Ranking, rank_layouts
from dist_llm.planner.refusals import (
    FEWEST_STEPS,
    MOST_DAYS,
    MOST_STEPS,
    refuse_batch,
    refuse_batch_of,
    refuse_budget,
    refuse_failures,
    refuse_hours,
    refuse_little,
    refuse_machines,
    refuse_memory,
    refuse_repetition,
    refuse_shapes,
    refuse_steps,
    refuse_years,
)
from dist_llm.planner.shapes import FEWEST_PARAMS, Shape, law_parameters, measure, search_shapes
from dist_llm.planner.sizing import Size, choose_size, compared_laws, size_of_model, with_params
from dist_llm.planner.spending import Spending, spend

CLOSE = 0.01
"""Part of a budget of device-hours or money that may be left over; none is overdrawn."""

IDLE = 0.15
"""What halving the data ranks is worth, in ln of the batch: it is made up for by tensor or pipeline ranks."""

MOST_ROUNDS = 12
MOST_REFUSALS = 3
"""Guesses without a plan after which the search for device-hours starts from the smallest plan there is."""

MOST_UNSPENT = 4
"""A budget of so many times what the largest plan takes is refused."""

LEAST_ROUNDS = 12
"""Budgets, each four times the last, that the smallest plan is looked for at."""

USUAL_MFU = 0.35
LEAST_GOODPUT = 0.5
"""Below it failures, not work, are what takes the time."""


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
        return _machines(self.request)[0]


def make_plan(request: PlanRequest, law: Law) -> Plan:
    """Return the plan of a request. Raises ConfigError with what cannot be, and what comes nearest."""
    if broken := check_request(request):
        raise ConfigError(broken)
    if request.budget.flops is not None:
        plan = _plan_flops(request, law, request.budget.flops)
    else:
        plan = _plan_hours(request, law)
    if request.data.tokens and plan.size.loss and plan.size.loss > (guess := math.log(plan.shape.model.vocab_size)):
        raise refuse_repetition(request, plan.size, guess, lambda tokens: _size_of(law, plan, tokens))
    if plan.spending.reliability.goodput < LEAST_GOODPUT:
        raise refuse_failures(request, plan.spending)
    if plan.spending.days > MOST_DAYS:
        raise refuse_years(request, plan.spending.days, plan.flops, partial(_draft_of, law))
    return plan


def _size_of(law: Law, plan: Plan, unique_tokens: float) -> Size:
    """Return parameters and tokens for the budget of a plan where there is other text."""
    if plan.request.preset is not None:
        return size_of_model(law, plan.size.num_params, plan.flops, unique_tokens)
    return choose_size(law, plan.flops, unique_tokens, plan.request.serving.tokens)


def check_request(request: PlanRequest) -> list[Violation]:
    """Return what is wrong with a request before anything is planned."""
    given = {name: value for name, value in request.budget.model_dump().items() if value is not None}
    return [*refuse_budget(given), *refuse_machines(request)]


def _plan_hours(request: PlanRequest, law: Law) -> Plan:
    """Return a plan whose device-hours are the budget's; where shapes leave a gap there, the nearest below."""
    cluster, budget = request.cluster, request.budget
    hours = budget.gpu_hours
    if hours is None:
        if not cluster.usd_per_device_hour:
            rule = "needs a price: set cluster.usd_per_device_hour"
            raise ConfigError([Violation("budget.usd", budget.usd, rule)])
        hours = float(budget.usd or 0) / cluster.usd_per_device_hour
    devices = _machines(request)[1]
    if hours > MOST_DAYS * 24 * devices:
        raise refuse_hours(request, hours / (24 * devices))
    flops, aim = hours * 3600 * peak_flops_per_second(request) * 0.4, hours * (1 - CLOSE / 2)
    low, high, slope, before = 0.0, math.inf, 1.0, None
    best: Plan | None = None
    refusals: list[ConfigError] = []
    for _ in range(MOST_ROUNDS):
        try:
            plan = _plan_flops(request, law, flops)
        except ConfigError as error:
            # A guess may be more than there is a plan for, and the budget itself be less.
            if _same_layout(refusals, error):
                raise
            refusals, high = [*refusals, error], flops
            if len(refusals) == MOST_REFUSALS and best is None:
                best = _least_plan(request, law, hours)
                low = best.flops if best else low
            flops = math.sqrt(low * high) if low else flops / 2
            continue
        apart = aim / plan.spending.device_hours
        if apart >= 1 - CLOSE / 2:
            low, best = flops, plan
        else:
            high = flops
        if abs(apart - 1) <= CLOSE / 2 or not apart or high < (1 + CLOSE / 2) * low:
            break
        if before is not None:
            # Larger models use devices better: hours grow as a power of FLOPs.
            slope = min(1.2, max(0.3, math.log(before[1] / apart) / math.log(flops / before[0])))
        before = (flops, apart)
        guess = flops * apart ** (1 / slope)
        flops = guess if low < guess < high else math.sqrt(low * high)
    if refusals and (best is None or MOST_UNSPENT * best.spending.device_hours < hours):
        raise refusals[0]
    return best or plan


def _same_layout(refusals: Sequence[ConfigError], error: ConfigError) -> bool:
    """Return whether what is fixed of the layout is refused again, and alone: no other budget helps."""
    again = {violation.key for violation in error.violations}
    parts = {key.partition(".")[0] for key in again}
    return bool(refusals) and parts <= {"parallel"} and again == {each.key for each in refusals[-1].violations}


def _least_plan(request: PlanRequest, law: Law, hours: float) -> Plan | None:
    """Return the smallest plan there is, None if none is found. Raises ConfigError if it takes more hours."""
    flops = least_flops(law)
    for times in range(LEAST_ROUNDS):
        with suppress(ConfigError):
            plan = _plan_flops(request, law, flops * 4.0**times)
            break
    else:
        return None
    if (needed := plan.spending.device_hours) <= hours:
        return plan
    raise refuse_little(request, f"the smallest plan here takes {needed:.2g} device-hours", needed / hours)


def _plan_flops(request: PlanRequest, law: Law, flops: float) -> Plan:
    """Return the plan of so many training FLOPs."""
    nodes, devices = _machines(request)
    days = flops / (USUAL_MFU * devices * peak_flops_per_second(request)) / 86400
    if days > 2 * MOST_DAYS:
        raise refuse_years(request, days, flops, partial(_draft_of, law))
    size, shapes = _model(request, law, flops)
    shape = shapes[0]
    batch, draft = _draft(request, size, shape)

    def redraft(other: PlanRequest) -> RunConfig:
        return _draft(other, size, shape)[1]

    pins, first = pins_of(request), draft
    ranking = rank_layouts(draft, devices, pins)
    while not ranking.proposed and not request.data.global_batch and _sequences(draft) < 4 * batch.batch_sequences:
        draft = _resized(draft, size, 2 * _sequences(draft))
        ranking = rank_layouts(draft, devices, pins)
    if not ranking.proposed:
        raise refuse_batch(request, first if pins.values else draft, devices, redraft)
    if size.tokens < FEWEST_STEPS * _sequences(draft) * draft.data.seq_len:
        raise refuse_steps(request, draft, size.tokens)
    if not ranking.fitting:
        raise refuse_memory(request, ranking, flops, partial(_draft_of, law), redraft)
    best, steps = ranking.fitting[0], draft.run.steps
    spending = spend(request.cluster, devices, nodes, shape.num_params, steps * best.step.seconds)
    config = _with_checkpoints(best, spending)
    compared = tuple(compared_laws(law, flops))
    return Plan(request, law, flops, size, compared, shapes, batch, steps, ranking, spending, config)


def _draft(request: PlanRequest, size: Size, shape: Shape) -> tuple[Recommendation, RunConfig]:
    """Return what is advised of the batch, and the run, not yet split."""
    seq_len = request.data.seq_len or min(4096, shape.model.max_seq_len)
    devices = _machines(request)[1]
    batch = recommend(law_parameters(shape, embeddings=False), size.tokens, seq_len)
    filled = filled_sequences(request)
    sequences = request.data.global_batch or round_batch(batch.batch_sequences, devices, filled)
    sizes = (sequences, seq_len, _steps(size, sequences * seq_len))
    if sizes[2] > MOST_STEPS:
        raise refuse_batch_of(request, sequences, sizes[2])
    return batch, draft_config(request, shape.model, batch, sizes, _hosts(request))


def _draft_of(law: Law, request: PlanRequest, flops: float) -> RunConfig:
    size, shapes = _model(request, law, flops)
    return _draft(request, size, shapes[0])[1]


def _resized(draft: RunConfig, size: Size, sequences: int) -> RunConfig:
    """Return a run of as many tokens with another batch."""
    data = draft.data.model_copy(update={"global_batch": sequences})
    steps = _steps(size, sequences * data.seq_len)
    schedule = draft.schedule.model_copy(update={"warmup_steps": warmup_steps(steps)})
    run = draft.run.model_copy(update={"steps": steps})
    return draft.model_copy(update={"data": data, "schedule": schedule, "run": run})


def _steps(size: Size, batch_tokens: int) -> int:
    return max(1, round(size.tokens / batch_tokens))


def _sequences(draft: RunConfig) -> int:
    return draft.data.global_batch


def _model(request: PlanRequest, law: Law, flops: float) -> tuple[Size, tuple[Shape, ...]]:
    """Return size and shapes, the best first, for a budget."""
    unique = request.data.tokens
    if request.preset is not None:
        shape = measure(request.preset)
        params = law_parameters(shape, law.counts_embeddings)
        return size_of_model(law, params, flops, unique), (shape,)
    if request.serving.tokens and not isinstance(law, ParametricLaw):
        rule = "says nothing of the loss, which serving.tokens is weighed by"
        raise ConfigError([Violation("law", request.law, rule, (DEFAULT_LAW, "hoffmann-3", "muennighoff"))])
    size = choose_size(law, flops, unique, request.serving.tokens)
    if size.num_params < FEWEST_PARAMS:
        rule = f"{law.name} asks for {size.num_params:.2g} parameters"
        raise refuse_little(request, rule, least_flops(law) / flops)
    seq_len = _seq_len(request, size.num_params)
    judge = law if size.loss is not None else None

    def loss_ratio(num_params: float) -> float:
        if judge is None or size.loss is None:
            return 1 + 0.02 * math.log(num_params / size.num_params) ** 2
        return (with_params(judge, size, num_params, unique).loss or size.loss) / size.loss

    def shapes_of(asked: PlanRequest) -> tuple[Shape, ...]:
        target, tensor = size.num_params, asked.parallel.tensor or 1
        return tuple(search_shapes(asked.model, seq_len, target, law.counts_embeddings, loss_ratio, tensor))

    shapes = shapes_of(request)
    if not shapes:
        raise refuse_shapes(request, size.num_params, lambda asked: bool(shapes_of(asked)))
    exact = with_params(law, size, law_parameters(shapes[0], law.counts_embeddings), unique)
    return exact, shapes


def least_flops(law: Law) -> float:
    """Return a budget for which the law asks for the smallest model that is searched."""
    flops = 1e6
    while law.optimal(flops).num_params < FEWEST_PARAMS:
        flops *= 1.5
    return flops


def precision_of(request: PlanRequest) -> str:
    """Return the format of products: as asked, else bf16 on GPUs and fp32 on CPUs."""
    return request.precision or ("fp32" if request.cluster.device == "cpu" else "bf16")


def peak_flops_per_second(request: PlanRequest) -> float:
    """Return the peak of one device in that format, in FLOP/s."""
    return float(getattr(request.cluster.peak_tflops, precision_of(request)) * 1e12)


def _seq_len(request: PlanRequest, num_params: float) -> int:
    if request.data.seq_len is not None:
        return request.data.seq_len
    return 4096 if num_params >= 1e9 else 2048 if num_params >= 1e8 else 512


def _machines(request: PlanRequest) -> tuple[int, int]:
    """Return nodes and devices."""
    nodes = request.cluster.nodes or 1
    return nodes, nodes * node_devices(request.cluster)


def _hosts(request: PlanRequest) -> tuple[int, int]:
    """Return the hosts on which ranks are started, and how many on each."""
    nodes, devices = _machines(request)
    each = request.cluster.devices_per_host or devices // nodes
    return devices // each, each


def round_batch(sequences: float, devices: int, filled: int = 1) -> int:
    """Return a number near to a batch that many layouts of so many devices divide, a multiple of `filled`.

    2^k or 3 x 2^k, times the odd part of the devices where that changes the batch by less than a half. Published laws
    lie further apart than these: each time that devices must be halved to divide it counts as IDLE in ln of the batch.
    """

    def cost(number: int) -> float:
        return abs(math.log(number / wanted)) + IDLE * math.log2(devices / math.gcd(devices, unit * number))

    odd = devices
    while odd % 2 == 0:
        odd //= 2
    unit = odd if odd not in (1, 3) and odd < 1.5 * sequences else 1
    unit = math.lcm(unit, filled)
    wanted = max(1.0, sequences / unit)
    exponent = max(0, math.floor(math.log2(wanted)))
    near = [2**exponent, 3 * 2 ** (exponent - 1) if exponent else 2, 2 ** (exponent + 1)]
    best: int = min(near, key=cost)
    return unit * best


def _with_checkpoints(best: Ranked, spending: Spending) -> RunConfig:
    """Return the config of the best layout, saving at Daly's interval."""
    steps = round(spending.reliability.checkpoint_interval_seconds / best.step.seconds)
    interval = min(max(1, steps), best.config.run.steps)
    checkpoint = best.config.checkpoint.model_copy(update={"interval": interval})
    return best.config.model_copy(update={"checkpoint": checkpoint})
