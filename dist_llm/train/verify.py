"""Prove that layouts train the same model: the same steps in one process and in many, compared tensor by tensor.

Bounds (relative): fp32 losses and gradient norms 1e-5, weights ||a-b|| / ||b|| 1e-5; fp64 all 1e-9. A key bias that is
added alike at every position has no true gradient under softmax and Adam turns its rounding into steps, so its gradient
is held to 1e-6 of the norm; under rotary positions or QK-norm it has one, and it is compared as any weight.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_llm.config.checks import check
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.data.indexed import IndexedDataset
from dist_llm.data.loader import TokenLoader
from dist_llm.data.prepare import prepare
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.engine.native import NativeEngine
from dist_llm.errors import ConfigError, Violation
from dist_llm.runtime.mesh import build_mesh
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.layouts import CASES, Case, baseline, case_config, given, misfit

Array = NDArray[Any]
Rectangle = tuple[str, tuple[int, ...], tuple[int, ...], Array]
"""A part of a logical tensor: the tensor's name and shape, the part's offsets and values."""

BOUNDS = {"fp32": 1e-5, "fp64": 1e-9}
"""Largest relative difference of loss, gradient norm and each weight."""
KEY_BIAS_BOUND = {"fp32": 1e-6, "fp64": 1e-9}
"""Largest norm of a key bias's gradient, as a share of the global gradient norm."""


@dataclass
class Trace:
    """What a training run left on one rank: curves, primary rectangles of the weights, key-bias gradients' share."""

    losses: list[float]
    grad_norms: list[float]
    weights: list[Rectangle] = field(default_factory=list)
    key_bias_shares: list[dict[str, float]] = field(default_factory=list)


class KeyBias:
    """Notes the norm of this rank's primary key-bias gradients at each step, before the optimizer rescales them.

    None where positions or a norm act on the key after its bias, which then has a gradient like any weight.
    """

    def __init__(self, engine: NativeEngine, model: ModelConfig) -> None:
        self._engine = engine
        self._adds_alike = model.position != "rope" and not model.qk_norm
        self.norms: list[dict[str, float]] = []

    def observe(self, phase: str) -> None:
        """Look when the gradients are complete."""
        if phase != "before_update":
            return
        gradients = {shard.name: shard.gradient() for shard in self._engine.shards if shard.primary}
        self.norms.append(
            {
                name: gradient.double().norm().item()
                for name, gradient in gradients.items()
                if gradient is not None and self._adds_alike and name.endswith("attention.wk.bias")
            }
        )


def train_case(config: RunConfig, prefix: Path, eos_id: int, steps: int) -> Trace:
    """Train the first `steps` steps in the current process group and return this rank's trace."""
    engine = NativeEngine(config, build_mesh(config.parallel, torch.device("cpu")))
    key_bias = KeyBias(engine, config.model)
    engine.observe = key_bias.observe
    loader = TokenLoader(
        IndexedDataset(prefix), config.data, config.run.seed, engine.data_slice, eos_id, config.model.vocab_size
    )
    results = [engine.train_step(loader.batch(step)) for step in range(steps)]
    trace = Trace([r.loss for r in results], [r.grad_norm for r in results])
    for result, norms in zip(results, key_bias.norms, strict=True):
        scale = result.grad_norm * result.tokens * engine.loss_unit
        trace.key_bias_shares.append({name: norm / scale for name, norm in norms.items()})
    for shard in engine.shards:
        if shard.primary:
            trace.weights.append((shard.name, shard.shape, shard.offsets, shard.inside(shard.tensor).numpy().copy()))
    engine.close()
    gc.collect()
    return trace


def assemble(rectangles: Iterable[Rectangle]) -> dict[str, Array]:
    """Put rectangles of all ranks together into logical tensors; NaN where none lies."""
    whole: dict[str, Array] = {}
    for name, shape, offsets, data in rectangles:
        target = whole.setdefault(name, np.full(shape, np.nan, data.dtype))
        target[tuple(slice(at, at + size) for at, size in zip(offsets, data.shape, strict=True))] = data
    return whole


def _finite(gap: float) -> float:
    """Return the gap, infinite where it is not a number: NaN compares as neither larger nor smaller."""
    return gap if math.isfinite(gap) else math.inf


def _largest(a: list[float], b: list[float]) -> float:
    return max((_finite(abs(x - y) / abs(y)) for x, y in zip(a, b, strict=True)), default=0.0)


def _largest_key_bias(traces: list[Trace]) -> float:
    """Return the largest share of a key bias, whole, in the gradient norm of any step."""
    worst = 0.0
    for shares in zip(*(trace.key_bias_shares for trace in traces), strict=True):
        for name in {name for share in shares for name in share}:
            worst = max(worst, _finite(math.sqrt(sum(share.get(name, 0.0) ** 2 for share in shares))))
    return worst


@dataclass(frozen=True)
class Difference:
    """How far a case is from one process: largest relative differences, and the weight that differs most."""

    layout: str
    loss: float
    grad_norm: float
    weights: float
    worst_weight: str
    key_bias_gradient: float
    seconds: float
    ok: bool


def compare(case: Case, traces: list[Trace], one: list[Trace], precision: str, seconds: float) -> Difference:
    """Return how far the ranks of a case are from one process; what is missing or not a number differs infinitely."""
    ours, theirs = (assemble(row for trace in side for row in trace.weights) for side in (traces, one))
    without_gradient = {name for trace in one for shares in trace.key_bias_shares for name in shares}
    worst, worst_name = 0.0, ""
    for name, reference in theirs.items():
        if name in without_gradient:
            continue
        scale = float(np.linalg.norm(reference.astype(np.float64)))
        mine = ours.get(name, np.full_like(reference, np.nan))
        gap = float(np.linalg.norm((mine - reference).astype(np.float64)))
        ratio = _finite(gap / scale if scale else gap)
        if ratio > worst:
            worst, worst_name = ratio, name
    loss = max(_largest(trace.losses, one[0].losses) for trace in traces)
    norm = max(_largest(trace.grad_norms, one[0].grad_norms) for trace in traces)
    share = _largest_key_bias(traces)
    bound = BOUNDS[precision]
    ok = loss <= bound and norm <= bound and worst <= bound and share <= KEY_BIAS_BOUND[precision]
    return Difference(case.name, loss, norm, worst, worst_name, share, round(seconds, 2), ok)


def verify_layout(
    config: RunConfig,
    *,
    fp64: bool = False,
    layouts: str = "all",
    steps: int = 20,
    report: Callable[[str], None] = lambda message: None,
    train: Callable[[RunConfig, Path, int, int], Trace] = train_case,
) -> dict[str, object]:
    """Train `steps` steps in one process, on the layout of the config and in every legal case; return the differences.

    layouts: `all`, or text that a case's name must contain. The facts are JSON-able; `ok` is true when every difference
    is within its bound.
    """
    precision = "fp64" if fp64 else "fp32"
    chosen = choose(config, layouts)
    prepared = prepare(config.data, config.tokenizer, config.model.vocab_size, report)
    eos_id = Tokenizer.load(prepared.tokenizer_path).eos_id
    rows: list[Difference] = []
    refused: dict[str, str] = {}
    references: dict[str, list[Trace]] = {}
    excluded = excluded_settings(config.model)
    for setting, why in excluded.items():
        report(f"{setting} {why}")
    with WorkerPool(max((case.ranks for case in chosen), default=1), timeout_seconds=300.0) as pool:

        def run(case: Case) -> list[Trace]:
            run_config = case_config(config, case, precision)
            return pool.run(train, run_config, prepared.prefix, eos_id, steps, world=case.ranks)

        for case in chosen:
            reason = misfit(config, case) or "; ".join(
                str(violation) for violation in check(case_config(config, case, precision), case.ranks)
            )
            if reason:
                refused[case.name] = reason
                continue
            if case.variant not in references:
                report(f"one process: {case.variant}")
                references[case.variant] = run(baseline(case.variant))
            began = time.perf_counter()
            row = compare(case, run(case), references[case.variant], precision, time.perf_counter() - began)
            rows.append(row)
            report(_line(row))
    return _summary(rows, {"excluded": excluded, "not_legal": refused}, precision, steps)


def excluded_settings(model: ModelConfig) -> dict[str, str]:
    """Return the settings of the model that the promise of equal layouts leaves out, and what was done about them."""
    if model.attention_dropout == 0:
        return {}
    why = "its masks are drawn inside fused attention, differently on each layout"
    return {"model.attention_dropout": f"{model.attention_dropout:g} taken as 0: {why}"}


def choose(config: RunConfig, layouts: str) -> list[Case]:
    """Return the config's own layout and the cases, or those whose name contains `layouts`; ConfigError if none."""
    own = given(config)
    cases = [own, *(case for case in CASES if not case.is_like(own))] if own.ranks > 1 else list(CASES)
    chosen = [case for case in cases if layouts == "all" or layouts in case.name]
    if not chosen:
        rule = "is in the name of no layout; names are such as"
        raise ConfigError([Violation("--layouts", layouts, rule, tuple(case.name for case in cases[:3]))])
    return chosen


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
        "bounds": {"relative": BOUNDS[precision], "key_bias_gradient": KEY_BIAS_BOUND[precision]},
        "layouts": [asdict(row) for row in rows],
        **left_out,
    }
