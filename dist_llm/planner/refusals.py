"""What to say when there is no plan: which setting, why, and the nearest that there is a plan for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import islice, takewhile

from dist_llm.accounting.params import num_parameters
from dist_llm.config.checks import OF_THIS_MACHINE, RULES, check
from dist_llm.config.operations import LauncherConfig
from dist_llm.config.request import PlanRequest
from dist_llm.config.rules import divisors
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.cost.step import node_devices
from dist_llm.planner.pins import (
    FILLING,
    Pins,
    blame_pins,
    broken_rules,
    filled_sequences,
    free_pins,
    pins_of,
    with_pins,
)
from dist_llm.planner.proposals import propose_layouts
from dist_llm.planner.ranking import FULL, Ranking, fitting_layouts, holds
from dist_llm.planner.shapes import MOST_LAYERS
from dist_llm.planner.sizing import Size
from dist_llm.planner.spending import Spending

MOST_NODES = 2**14
MOST_STEPS = 2**31 - 1
FEWEST_STEPS = 10
"""A run of fewer steps is none, and its tokens could not be rounded to whole ones."""

LARGEST_PARAMS = 1e12
"""Parameters for which there are shapes, whatever the vocabulary."""

USUAL_LENGTH = 4096
"""Tokens of a sequence above which shorter ones are proposed."""

MOST_DAYS = 3653.0
"""A plan that takes longer than ten years is none."""

DraftOf = Callable[[PlanRequest, float], RunConfig]
"""The run, not yet split, that a request has for so many training FLOPs."""


Redraft = Callable[[PlanRequest], RunConfig]
"""The run, not yet split, of the same model and tokens that another request has."""


def refuse_budget(given: Mapping[str, float]) -> Iterator[Violation]:
    """Yield what is wrong with a request that has no budget, or several."""
    if not given:
        rule = "must be given, or budget.gpu_hours or budget.usd: a plan starts from what may be spent"
        yield Violation("budget.flops", None, rule, (1e21,))
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
        yield Violation("cluster.devices_per_host", host, rule, tuple(n for n in divisors(each) if n <= host)[-1:])
    bounds = LauncherConfig.model_fields["nodes"].metadata
    most = next(bound.le for bound in bounds if hasattr(bound, "le"))
    if nodes > most:
        yield Violation("cluster.nodes", nodes, f"must be at most {most}", (most,))
    if (hosts := nodes * each // host) > 1 and request.launcher == "local":
        yield Violation("launcher", "local", f"starts ranks on one host, and there are {hosts}", ("slurm",))


def refuse_years(request: PlanRequest, days: float, flops: float, draft_of: DraftOf) -> ConfigError:
    """Return the error of a plan that takes too long on the nodes there are, with nodes and a budget that do not."""
    nodes, times = request.cluster.nodes or 1, days / MOST_DAYS
    rule = f"would take about {days:,.0f} days, and {MOST_DAYS / 365.25:.0f} years are the most that is planned"
    enough = (n for n in _doubled(nodes) if n >= 2 * nodes * times)
    try:
        more = _holding(request, enough, lambda asked: draft_of(asked, flops))
    except ConfigError:
        more = ()  # so large a budget has no model
    violations = [Violation("cluster.nodes", nodes, rule, more), *_smaller(request, flops, 0.7 / times, draft_of)]
    stuck = not any(violation.legal for violation in violations)
    return ConfigError([*violations, *(free_pins(pins_of(request)) if stuck else [])])


def refuse_hours(request: PlanRequest, days: float) -> ConfigError:
    """Return the error of device-hours, or money, that the nodes there are do not use up in time."""
    name, budget = _budget(request)
    nodes, times = request.cluster.nodes or 1, days / MOST_DAYS
    rule = f"lasts {days:,.0f} days on {nodes} nodes, and {MOST_DAYS / 365.25:.0f} years are the most that is planned"
    violations = [Violation(f"budget.{name}", budget, rule, (float(f"{0.95 * budget / times:.2g}"),))]
    if (enough := math.ceil(1.1 * nodes * times)) <= MOST_NODES:
        violations.append(Violation("cluster.nodes", nodes, "or take more", (enough,)))
    return ConfigError(violations)


def refuse_failures(request: PlanRequest, spending: Spending) -> ConfigError:
    """Return the error of a cluster that fails more often than it trains."""
    cluster, goodput = request.cluster, spending.reliability.goodput
    rule = (
        f"lets {spending.devices} devices fail every {spending.reliability.job_mtbf_hours:.2g} hours: "
        f"steps would advance in {goodput:.2g} of the time"
    )
    enough = float(f"{20 * spending.devices * (spending.save_seconds + spending.restart_seconds) / 3600:.1g}")
    return ConfigError([Violation("cluster.mtbf_device_hours", cluster.mtbf_device_hours, rule, (enough,))])


def refuse_little(request: PlanRequest, rule: str, times: float) -> ConfigError:
    """Return the error of a budget that trains nothing, with a tenth more than so many times it."""
    name, budget = _budget(request)
    words = f"is too little to train anything: {rule}"
    return ConfigError([Violation(f"budget.{name}", budget, words, (float(f"{1.1 * budget * times:.2g}"),))])


def refuse_repetition(request: PlanRequest, size: Size, guess: float, size_of: Callable[[float], Size]) -> ConfigError:
    """Return the error of text repeated so often that the law foretells less than a guess, with text enough."""
    unique = float(request.data.tokens or 0)
    rule = f"would be seen {size.epochs:.3g} times, at a loss of {size.loss:.4g}: a guess has {guess:.3g} nats a token"
    more = (unique * 2.0**times for times in range(1, 100))
    enough = next((tokens for tokens in more if (size_of(tokens).loss or 0.0) < guess), None)
    return ConfigError([Violation("data.tokens", unique, rule, () if enough is None else (float(f"{enough:.2g}"),))])


def refuse_batch(request: PlanRequest, draft: RunConfig, devices: int, redraft: Redraft) -> ConfigError:
    """Return the error of a run that has no layout: rules that it breaks on any, or a batch for fewer devices."""
    elsewhere = {slip.words for rule in RULES if rule.name in OF_THIS_MACHINE for slip in rule(draft, None)}
    if broken := [violation for violation in check(draft, None) if violation.rule not in elsewhere]:
        return ConfigError([_as_requested(violation) for violation in broken])
    nodes, sequences, pins = request.cluster.nodes or 1, draft.data.global_batch, pins_of(request)
    rule = f"leaves no layout of {sequences} sequences of {draft.data.seq_len} tokens on {devices} devices"
    each = devices // nodes
    rules = broken_rules(draft, devices, pins)
    drafts = cache(lambda filled: redraft(with_pins(request, Pins(dict(filled)))))

    def draft_with(left: Pins) -> RunConfig:
        """Return the run whose batch fills what is fixed still."""
        return drafts(tuple((name, value) for name, value in left.values.items() if name in FILLING))

    blamed = blame_pins(pins, rule, lambda left: fitting_layouts(draft_with(left), devices, left), rules)
    rule += ", and none that fits with another value"
    blamed = blamed or blame_pins(pins, rule, lambda left: _proposed(draft_with(left), devices, left), rules)
    if blamed:
        return ConfigError(blamed)
    rule = f"has {devices} devices, and a batch of {sequences} sequences can be dealt to so many in no layout"
    halves = (nodes >> times for times in range(1, nodes.bit_length()))
    fewer = tuple(islice((n for n in halves if holds(draft, n * each, pins)), 1))
    larger, all_sequences = _dealt(draft, devices, pins), draft.run.steps * sequences
    violations = [Violation("cluster.nodes", nodes, rule, fewer)]
    if larger is None:
        violations += free_pins(pins)
    elif FEWEST_STEPS * larger > all_sequences:
        violations.append(
            _more_tokens(
                request, FEWEST_STEPS * larger / all_sequences, f"or spend more, with data.global_batch={larger}"
            )
        )
    else:
        violations.append(Violation("data.global_batch", sequences, "or take a batch that they divide", (larger,)))
    return ConfigError(violations)


def _dealt(draft: RunConfig, devices: int, pins: Pins) -> int | None:
    """Return the smallest batch above a run's that can be dealt to so many devices, None where there is none."""
    unit, sequences = int(pins.values.get("microbatch", 1)), draft.data.global_batch
    for batch in (unit * ranks for ranks in divisors(devices)):
        larger = -(-sequences // batch) * batch
        more = draft.model_copy(update={"data": draft.data.model_copy(update={"global_batch": larger})})
        if any(_proposed(more, devices, pins)):
            return larger
    return None


def _as_requested(violation: Violation) -> Violation:
    """Return a violation by the key that a request has for it: `engine` for `engine.name`."""
    return replace(violation, key=violation.key.removesuffix(".name"))


def _proposed(draft: RunConfig, devices: int, pins: Pins) -> Iterator[RunConfig]:
    """Yield the layouts that pins leave, whether they fit or not."""
    return (variants[0] for variants in propose_layouts(draft, devices, node_devices(draft.cluster), pins))


def refuse_steps(request: PlanRequest, draft: RunConfig, tokens: float) -> ConfigError:
    """Return the error of a batch that is nearly all there is to train on."""
    data = draft.data
    rule = f"makes steps of {data.global_batch * data.seq_len:,} tokens, and the budget trains on {tokens:,.0f}"
    if request.data.seq_len is not None and FEWEST_STEPS * data.seq_len > tokens:
        shorter = 2 ** max(0, int(math.log2(max(1.0, tokens / 1000))))
        return ConfigError([Violation("data.seq_len", data.seq_len, rule, (shorter,))])
    if request.data.global_batch is not None:
        filled = filled_sequences(request)
        fewer = (filled * 2 ** max(0, int(math.log2(max(1.0, tokens / data.seq_len / 1000 / filled)))),)
        return ConfigError([Violation("data.global_batch", data.global_batch, rule, fewer)])
    return ConfigError([_more_tokens(request, FEWEST_STEPS * data.global_batch * data.seq_len / tokens, rule)])


def _more_tokens(request: PlanRequest, times: float, rule: str) -> Violation:
    """Return a budget that trains on so many times the tokens: half of it, in logarithms, goes to a larger model."""
    name, budget = _budget(request)
    more = 1.2 * budget * times ** (2 if request.preset is None else 1)
    return Violation(f"budget.{name}", budget, rule, (float(f"{more:.2g}"),))


def refuse_shapes(request: PlanRequest, num_params: float, has_shapes: Callable[[PlanRequest], bool]) -> ConfigError:
    """Return the error of a request that fixes so much of the model, or asks for so large a one, that none is left.

    has_shapes: whether another request leaves one.
    """
    wish = request.model
    rule = (
        f"leaves no shape of about {num_params:.3g} parameters: of at most {MOST_LAYERS} layers, "
        "key heads that divide the others, heads of even width"
    )
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
    fixed = {name: getattr(wish, name) for name in names if getattr(wish, name) is not None}
    freed = {name: request.model.model_copy(update={name: None}) for name in fixed}
    cures = {name for name, model in freed.items() if has_shapes(request.model_copy(update={"model": model}))}
    violations = [
        Violation(f"model.{name}", value, rule, (None,)) for name, value in fixed.items() if name in cures or not cures
    ]
    tensor, pins = request.parallel.tensor or 1, pins_of(request)
    if tensor > 1:
        ranks = (n for n in divisors(node_devices(request.cluster))[::-1] if n != tensor)
        others = tuple(n for n in ranks if has_shapes(with_pins(request, pins.with_("tensor", n))))
        violations.insert(0, Violation("parallel.tensor", tensor, f"{rule}, split over so many", others[:3]))
    if violations:
        return ConfigError(violations)
    name, budget = _budget(request)
    near = float(f"{budget * min(0.5, (LARGEST_PARAMS / num_params) ** 2):.2g}")
    return ConfigError([Violation(f"budget.{name}", budget, rule, (near,))])


def refuse_batch_of(request: PlanRequest, sequences: int, steps: int) -> ConfigError:
    """Return the error of a batch so small that its steps cannot be counted."""
    rule = f"makes {steps:,} steps, and {MOST_STEPS:,} are the most of a run"
    enough = 2 ** math.ceil(math.log2(sequences * steps / MOST_STEPS))
    return ConfigError([Violation("data.global_batch", sequences, rule, (enough,))])


def refuse_memory(
    request: PlanRequest, ranking: Ranking, flops: float, draft_of: DraftOf, redraft: Redraft
) -> ConfigError:
    """Return the error of a model that fits nowhere, with nodes that hold it and a budget whose model fits here.

    Where there are neither, devices whose memory would do.
    """
    least = ranking.too_large
    assert least is not None
    limit, nodes = FULL * request.cluster.memory_gib, request.cluster.nodes or 1
    needs = f"needs {least.peak_gib:.1f} of {limit:.1f} GiB a device"
    rule = (
        f"holds no layout of {num_parameters(least.config.model):.3g} parameters: the smallest of {ranking.proposed} "
        f"({least.name}) {needs}, most of it {least.memory.largest}"
    )
    devices, pins = nodes * node_devices(request.cluster), pins_of(request)
    short = f"leaves no layout that fits: the smallest ({least.name}) {needs}"
    blamed = blame_pins(pins, short, lambda left: fitting_layouts(least.config, devices, left))
    more = _holding(request, _doubled(nodes), redraft)
    violations = [*blamed, Violation("cluster.nodes", nodes, rule, more)]
    violations += _shorter(request, redraft)
    violations += _smaller(request, flops, 0.5, draft_of)
    if not any(violation.legal for violation in violations):
        enough = math.ceil(least.peak_gib / FULL)
        violations.append(Violation("cluster.memory_gib", request.cluster.memory_gib, "or take larger ones", (enough,)))
    return ConfigError(violations)


def _holding(request: PlanRequest, nodes: Iterable[int], redraft: Redraft) -> tuple[int, ...]:
    """Return the first of these numbers of nodes that holds the run that is drafted for them, if any does."""
    each, pins = node_devices(request.cluster), pins_of(request)

    def held(count: int) -> bool:
        cluster = request.cluster.model_copy(update={"nodes": count})
        return holds(redraft(request.model_copy(update={"cluster": cluster})), count * each, pins)

    return tuple(islice((count for count in nodes if held(count)), 1))


def _shorter(request: PlanRequest, redraft: Redraft) -> list[Violation]:
    """Return the longest sequences that the nodes hold, of those that are asked for halved until they are usual."""
    asked = request.data.seq_len or 0
    lengths = takewhile(lambda length: length >= USUAL_LENGTH, (asked >> times for times in range(1, 64)))
    devices, pins = (request.cluster.nodes or 1) * node_devices(request.cluster), pins_of(request)
    for length in lengths:
        data = request.data.model_copy(update={"seq_len": length})
        if holds(redraft(request.model_copy(update={"data": data})), devices, pins):
            return [Violation("data.seq_len", asked, "or train on shorter sequences", (length,))]
    return []


def _smaller(request: PlanRequest, flops: float, most: float, draft_of: DraftOf) -> list[Violation]:
    """Return the largest budget that the nodes hold a model of, halved from `most` of it on; none of a given model.

    Device-hours and money are taken in proportion to FLOPs, and a tenth less.
    """
    if request.preset is not None:
        return []
    name, budget = _budget(request)
    try:
        for times in range(40):
            part = float(f"{flops * most / 2**times:.2g}")
            draft = draft_of(request, part)
            if holds(draft, draft.launcher.nproc * draft.launcher.nodes, pins_of(request)):
                near = part if name == "flops" else float(f"{0.9 * budget * part / flops:.2g}")
                rule = "or take a smaller budget, and so a smaller model"
                return [Violation(f"budget.{name}", budget, rule, (near,))]
    except ConfigError:
        pass  # so small a budget has no model
    return []


def _budget(request: PlanRequest) -> tuple[str, float]:
    """Return which budget is given, and how much."""
    return next((name, float(value)) for name, value in request.budget.model_dump().items() if value is not None)


def _doubled(nodes: int) -> Iterator[int]:
    """Yield the powers of two above a number of nodes, as far as clusters go."""
    more = 1
    while more <= MOST_NODES:
        if more > nodes:
            yield more
        more *= 2
