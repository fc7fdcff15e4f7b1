"""Prove that layouts train the same model: the same steps in one process and in many, compared tensor by tensor.

Bounds are in train/compare.py. A layout that differs is run again for a few steps, looked at from inside and taken
apart: train/divergence.py says where it first differs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from dist_llm.config.checks import check
from dist_llm.config.run import RunConfig
from dist_llm.data.prepare import prepare
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import ConfigError, Violation
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.compare import BOUNDS, Difference, compare
from dist_llm.train.divergence import first_divergence
from dist_llm.train.layout_cases import CASES
from dist_llm.train.layouts import Case, baseline, case_config, given, is_mixed, misfit, variant_model
from dist_llm.train.trace import Trace, train_case

MOST_TRACED = 5
"""Layouts whose first divergence is sought; where more differ, the cause is most likely one."""

Train = Callable[[RunConfig, Path, int, int, int], Trace]
"""(config, prefix, eos_id, steps, the step to look at) to a rank's trace."""


def verify_layout(
    config: RunConfig,
    *,
    precision: str = "fp32",
    chosen: str = "all",
    layouts: str = "all",
    steps: int = 20,
    report: Callable[[str], None] = lambda message: None,
    train: Train = train_case,
) -> dict[str, object]:
    """Train `steps` steps in one process, on the layout of the config and in every legal case; return the differences.

    precision: fp32, fp64 or bf16. chosen: `quick` or `all` cases. layouts: `all` of these, or text that the name of a
    case, quick or not, must contain. The facts are JSON-able; `ok` is true when every difference is within its bound.
    Raises ConfigError, before anything is started, where the config's own layout is not legal or none can be tried.
    """
    cases = choose(config, layouts, chosen)
    _require_legal(config, cases, precision)
    prepared = prepare(config.data, config.tokenizer, config.model.vocab_size, report)
    source = (prepared.prefix, Tokenizer.load(prepared.tokenizer_path).eos_id)
    excluded = excluded_settings(config, precision)
    for setting, why in excluded.items():
        report(f"{setting} {why}")
    with WorkerPool(max((case.ranks for case in cases), default=1), timeout_seconds=300.0) as pool:

        def run(case: Case, steps: int, look: int) -> list[Trace]:
            return pool.run(train, case_config(config, case, precision), *source, steps, look, world=case.ranks)

        rows, refused = _compare_all(config, cases, steps, precision, (run, report))
    return _summary(rows, {"excluded": excluded, "not_legal": refused}, precision, steps)


def _compare_all(
    config: RunConfig,
    cases: list[Case],
    steps: int,
    precision: str,
    ways: tuple[Callable[[Case, int, int], list[Trace]], Callable[[str], None]],
) -> tuple[list[Difference], dict[str, str]]:
    """Return the difference of every legal case, and why the others are not. ways: to run a case, to report."""
    run, report = ways
    rows: list[Difference] = []
    refused: dict[str, str] = {}
    references: dict[str, list[Trace]] = {}

    def is_legal(case: Case) -> bool:
        return not refusal(config, case, precision)

    for case in cases:
        if reason := refusal(config, case, precision):
            refused[case.name] = reason
            continue
        if case.variant not in references:
            report(f"one process: {case.variant}")
            references[case.variant] = run(baseline(case.variant), steps, 0)
        began = time.perf_counter()
        row = compare(case, run(case, steps, 0), references[case.variant], precision, time.perf_counter() - began)
        report(_line(row))
        if not row.ok and sum(not other.ok for other in rows) < MOST_TRACED:
            model = variant_model(config.model, case.variant)
            row = replace(row, first_divergence=first_divergence(run, is_legal, case, model, steps, precision))
            report(f"first divergence: {row.first_divergence}")
        rows.append(row)
    return rows, refused


def _require_legal(config: RunConfig, cases: list[Case], precision: str) -> None:
    """Raise ConfigError where the config's own layout breaks a rule on its ranks, or no case can be tried."""
    own = given(config)
    violations = check(config, own.ranks) if own in cases else []
    if violations:
        raise ConfigError(violations)
    reasons = {case.name: refusal(config, case, precision) for case in cases}
    if all(reasons.values()):
        name, reason = next(iter(reasons.items()))
        raise ConfigError([Violation("--layouts", name, f"cannot be tried: {reason}")])


def refusal(config: RunConfig, case: Case, precision: str) -> str:
    """Return why a case cannot be tried; "" where it can."""
    return misfit(config, case) or "; ".join(
        str(violation) for violation in check(case_config(config, case, precision), case.ranks)
    )


def excluded_settings(config: RunConfig, precision: str) -> dict[str, str]:
    """Return the settings that a comparison of layouts leaves out, and what was done about them."""
    model, excluded = config.model, {}
    if config.parallel.fused_accumulation and not is_mixed(precision):
        excluded["parallel.fused_accumulation"] = f"taken as false: it has nothing to widen in {precision}"
    if config.engine.fp8 != "none":
        excluded["engine.fp8"] = f"{config.engine.fp8} taken as none: it rounds by the largest values of a whole tensor"
    if model.attention_dropout > 0:
        why = "its masks are drawn inside fused attention, differently on each layout"
        excluded["model.attention_dropout"] = f"{model.attention_dropout:g} taken as 0: {why}"
    if model.moe.num_experts and model.moe.capacity_factor is not None:
        why = "which rows an expert drops depends on how tokens are dealt to ranks and microbatches"
        excluded["model.moe.capacity_factor"] = f"{model.moe.capacity_factor:g} taken as null (dropless): {why}"
    return excluded


def choose(config: RunConfig, layouts: str, chosen: str = "all") -> list[Case]:
    """Return the config's own layout and the cases, or those of all whose name contains `layouts`; ConfigError if none.

    chosen: `all` cases, or the `quick` ones.
    """
    own = given(config)
    cases = [own, *(case for case in CASES if not case.is_like(own))] if own.ranks > 1 else list(CASES)
    if layouts == "all":
        return [case for case in cases if chosen == "all" or case.quick or case is own]
    named = [case for case in cases if layouts in case.name]
    if not named:
        rule = "is in the name of no layout"
        raise ConfigError([Violation("--layouts", layouts, rule, tuple(case.name for case in cases[:3]))])
    return named


def _line(row: Difference) -> str:
    verdict = "same" if row.ok else "DIFFERENT"
    gaps = f"loss {row.loss:.1e}  grad norm {row.grad_norm:.1e}  weights {row.weights:.1e}"
    return f"{verdict:9} {gaps}  {row.layout}"


def _summary(
    rows: list[Difference], left_out: Mapping[str, Mapping[str, str]], precision: str, steps: int
) -> dict[str, object]:
    return {
        "ok": bool(rows) and all(row.ok for row in rows),
        "precision": precision,
        "steps": steps,
        "bounds": {name: bound if math.isfinite(bound) else None for name, bound in asdict(BOUNDS[precision]).items()},
        "layouts": [asdict(row) for row in rows],
        **left_out,
    }
