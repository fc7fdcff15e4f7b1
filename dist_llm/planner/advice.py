"""A plan as plain data for JSON, and the reason for each choice in one sentence."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dist_llm.config.inputs import DataConfig
from dist_llm.planner.draft import HIGHEST_RATE
from dist_llm.planner.footprint import predict_memory
from dist_llm.planner.front import Point, pareto_front
from dist_llm.planner.native_memory import installed_torch
from dist_llm.planner.plan import Plan
from dist_llm.planner.ranking import FULL, Ranked
from dist_llm.planner.shapes import law_parameters
from dist_llm.planner.sizing import holding, spread_of

VAIN_EPOCHS = 40
"""Repeats after which more of them are worth nothing (Muennighoff et al. 2023, figure 1)."""


def describe(plan: Plan, top: int) -> dict[str, Any]:
    """Return the plan with its `top` fastest layouts, the Pareto front of memory and time, and the reasons."""
    size, spending, data = plan.size, plan.spending, plan.config.data
    params_spread, tokens_spread = spread_of(plan.compared)
    points = [Point(each.peak_gib, each.step.seconds, each.name) for each in plan.ranking.fitting]
    return {
        "flops": plan.flops,
        "training_flops": size.flops,
        "law": {
            "name": plan.law.name,
            "citation": plan.law.citation,
            "fitted_flops": plan.law.fitted_flops,
            "extrapolates": _extrapolates(plan),
        },
        "model": _model(plan),
        "tokens": plan.tokens,
        "tokens_interval": holding(size.tokens_interval, plan.tokens),
        "tokens_spread": tokens_spread,
        "num_params_spread": params_spread,
        "epochs": size.epochs,
        "loss": size.loss,
        "loss_interval": size.loss_interval,
        "serving": {"saved_flops": size.saved_flops, "saved_share": size.saved_share} if size.saved_flops else None,
        "laws": [
            {"name": law.name, "num_params": best.num_params, "tokens": best.tokens, "loss": best.loss}
            for law, best in plan.compared
        ],
        "shapes": [_shape(plan, index) for index in range(len(plan.shapes))],
        "batch": {"sequences": data.global_batch, "seq_len": data.seq_len, **asdict(plan.batch)},
        "optimizer": {"lr": plan.config.optimizer.lr, "warmup_steps": plan.config.schedule.warmup_steps},
        "steps": plan.steps,
        "layouts": [describe_layout(each, spending.devices) for each in plan.ranking.fitting[:top]],
        "pareto": [asdict(point) for point in pareto_front(points)],
        "num_layouts": {"weighed": plan.ranking.proposed, "fit": len(plan.ranking.fitting)},
        "step_seconds": plan.best.step.seconds,
        "mfu": plan.best.step.mfu,
        "days": spending.days,
        "days_interval": _days_interval(plan),
        "gpu_hours": spending.device_hours,
        "usd": spending.usd,
        "kilowatt_hours": spending.kilowatt_hours,
        "interruptions": {**asdict(spending.reliability), "save_seconds": spending.save_seconds},
        "checkpoint_interval_steps": plan.config.checkpoint.interval,
        "reasons": [{"choice": choice, "because": why} for choice, why in reasons(plan)],
    }


def describe_layout(ranked: Ranked, ranks: int) -> dict[str, Any]:
    """Return a layout with what is foretold of it."""
    step, parallel = ranked.step, ranked.config.parallel
    keys = ("tensor", "sequence", "pipeline", "virtual_pipeline", "schedule", "context", "expert", "data", "zero")
    return {
        "name": ranked.name,
        "overrides": {
            **{f"parallel.{key}": getattr(parallel, key) for key in keys},
            "parallel.recompute": parallel.recompute,
            "parallel.recompute_operators": list(parallel.recompute_operators),
            "parallel.recompute_layers": parallel.recompute_layers,
            "data.microbatch": ranked.config.data.microbatch,
        },
        "step_seconds": step.seconds,
        "components": dict(step.components),
        "mfu": step.mfu,
        "bound_by": step.bound_by,
        "memory_gib": predict_memory(ranked.config, ranks, installed_torch()).memory_gib(),
    }


def reasons(plan: Plan) -> list[tuple[str, str]]:
    """Return each choice with why it was made."""
    found = [_why_size(plan), _why_shape(plan), _why_batch(plan), _why_layout(plan), *_why_spending(plan)]
    budget, spent = plan.request.budget, plan.spending
    for name, had, used in (
        ("gpu_hours", budget.gpu_hours, spent.device_hours),
        ("usd", budget.usd, spent.usd),
    ):
        if had is not None and used < 0.95 * had:
            why = f"{1 - used / had:.0%} of it are left: the next larger model would take more than all"
            found.append((f"budget.{name}={had:g}", why))
    if plan.config.data.path == DataConfig.model_fields["path"].default:
        why = "the plan does not know your corpus: give data.path, and tokenizer.path if there is one, before launching"
        found.append((f"data.path={plan.config.data.path}", why))
    return found


def _extrapolates(plan: Plan) -> bool:
    """Return whether the budget lies outside of the runs that the law was fitted to."""
    fitted = plan.law.fitted_flops
    return fitted is not None and not fitted[0] <= plan.size.flops <= fitted[1]


def _model(plan: Plan) -> dict[str, Any]:
    shape = plan.shape
    interval = plan.size.num_params_interval
    # Laws count what a token meets, some without embeddings.
    part = law_parameters(shape, plan.law.counts_embeddings) / shape.num_params
    return {
        "num_params": shape.num_params,
        "active_params": shape.active_params,
        "num_params_interval": None if interval is None else (interval[0] / part, interval[1] / part),
        **plan.config.model.model_dump(mode="json"),
    }


def _shape(plan: Plan, index: int) -> dict[str, Any]:
    shape = plan.shapes[index]
    keys = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
    return {
        **{key: getattr(shape.model, key) for key in keys},
        "num_params": shape.num_params,
        "active_params": shape.active_params,
        "cost": shape.cost,
    }


def _why_size(plan: Plan) -> tuple[str, str]:
    size, (params, tokens) = plan.size, spread_of(plan.compared)
    loss = "" if size.loss is None else f", loss {size.loss:.4f}"
    shape, moe = plan.shape, plan.config.model.moe
    active = f" ({shape.active_params:,} a token: {moe.top_k} of {moe.num_experts} experts)" if moe.num_experts else ""
    choice = f"{shape.num_params:,} parameters{active} on {plan.tokens:,} tokens{loss}"
    others = f"; the laws of the Chinchilla runs say {params[0]:.3g} to {params[1]:.3g} and {tokens[0]:.3g} to "
    why = f"{size.why}{_why_repeats(plan)}{others}{tokens[1]:.3g}"
    if plan.shape.active_params != plan.shape.num_params:
        why += (
            f"; the law is of dense models and is asked about the {plan.shape.active_params:,} parameters that a token "
            "meets: what the other experts add to them it does not know"
        )
    fitted = plan.law.fitted_flops
    if fitted is not None and _extrapolates(plan):
        why += f"; this is outside of the {fitted[0]:.2g} to {fitted[1]:.2g} FLOPs of the runs behind the law"
    return choice, why


def _why_repeats(plan: Plan) -> str:
    """Return how often each token is seen, and what that costs, where there are too few."""
    size, unique = plan.size, plan.request.data.tokens
    if size.epochs <= 1 or unique is None:
        return ""
    fresh = plan.law.loss(size.num_params, size.tokens)
    cost = "" if fresh is None or size.loss is None else f", at a loss {size.loss - fresh:.2g} above that of fresh ones"
    vain = f"; after about {VAIN_EPOCHS} repeats teach next to nothing" if size.epochs > VAIN_EPOCHS else ""
    return f"; each of the {unique:.3g} tokens is seen {size.epochs:.3g} times{cost}{vain}"


def _why_shape(plan: Plan) -> tuple[str, str]:
    model = plan.shape.model
    choice = (
        f"{model.num_layers} layers of {model.hidden_size}, {model.num_heads} heads ({model.kv_heads} for keys), "
        f"feed-forward {model.ffn_hidden_size}, {model.vocab_size} tokens"
    )
    if plan.request.preset is not None:
        return choice, "the model is given"
    wish, names = plan.request.model, ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size")
    fixed = [name for name in names if getattr(wish, name) is not None]
    given = f"with {', '.join(fixed)} as given" if fixed else "of widths that matrix units and tp split evenly"
    aspect = model.hidden_size / model.num_layers
    return choice, f"{given} it costs least by its size and its depth: {aspect:.0f} wide a layer"


def _why_batch(plan: Plan) -> tuple[str, str]:
    data, batch = plan.config.data, plan.batch
    low, high = batch.batch_tokens_spread
    rates = batch.learning_rate_spread
    choice = (
        f"{data.global_batch} sequences of {data.seq_len} tokens a step, {plan.steps:,} steps, learning rate "
        f"{plan.config.optimizer.lr:.3g} after {plan.config.schedule.warmup_steps} steps of warm-up"
    )
    if plan.request.data.global_batch is not None:
        why = "the batch is given, the rate is of Step Law (Li et al. 2025)"
    else:
        why = f"Step Law (Li et al. 2025) has {batch.batch_sequences} sequences, of which this many can be dealt out"
    why += f"; published laws lie between {low:.3g} and {high:.3g} tokens, "
    capped = f"; at most {HIGHEST_RATE:g}, for they were fitted to larger models" if rates[1] > HIGHEST_RATE else ""
    return choice, f"{why}{rates[0]:.2g} and {rates[1]:.2g}{capped}"


def _why_layout(plan: Plan) -> tuple[str, str]:
    best, ranking = plan.best, plan.ranking
    nodes = f"{plan.nodes} node{'' if plan.nodes == 1 else 's'}"
    choice = f"{best.name} on {nodes}: {best.step.seconds:.3g} s a step, MFU {100 * best.step.mfu:.1f} %"
    why = (
        f"the fastest of {len(ranking.fitting)} that fit in {FULL:.0%} of {plan.request.cluster.memory_gib:g} GiB "
        f"(of {ranking.proposed} weighed); its fullest device needs {best.peak_gib:.1f} GiB, and its step is bound by "
        f"{best.step.bound_by.replace('_', ' ')}"
    )
    return choice, why


def _days_interval(plan: Plan) -> tuple[float, float] | None:
    """Return between how many days nine of ten such plans would end, where the cluster's steps have been compared."""
    error, days = plan.request.cluster.step_error, plan.spending.days
    return None if error is None else (days / (1 + error), days / (1 - error))


def _why_spending(plan: Plan) -> list[tuple[str, str]]:
    spending, cluster = plan.spending, plan.request.cluster
    found = spending.reliability
    cost = (
        f"{spending.days:.3g} days, {_said(spending.device_hours)} device-hours, {_said(spending.usd)} USD, "
        f"{_said(spending.kilowatt_hours)} kWh"
    )
    price = (
        f"{cluster.usd_per_device_hour:g} USD an hour and {cluster.watts_per_device:g} W a device of {cluster.name}; "
        f"steps advance in {found.goodput:.1%} of the time; {_said_error(plan)}"
    )
    saves = f"a checkpoint every {plan.config.checkpoint.interval} steps"
    failures = (
        f"a failure is expected every {_said(found.job_mtbf_hours)} hours ({found.interruptions:.2g} in all) and a "
        f"save takes {spending.save_seconds:.2g} s (Daly 2006)"
    )
    return [(cost, price), (saves, failures)]


def _said_error(plan: Plan) -> str:
    """Return how far off the time may be."""
    interval = _days_interval(plan)
    if interval is None:
        return "no measured steps of this hardware were compared, so how far off this is is not known"
    return f"by measured steps of this hardware {interval[0]:.3g} to {interval[1]:.3g} days, nine times in ten"


def _said(number: float) -> str:
    """Return a number of three digits, or whole where it has more."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
