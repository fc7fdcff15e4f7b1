"""Prove that engines train the same model: same weights, same data, same steps, in every layout that they share.

alone     0 ----------------------------> N    each engine, held to the native one in the same layout
switched  0 ----> N/2 on A | save, load | N/2 ----> N on B    held to A alone, for every ordered pair

Everything is in fp32 on CPU ranks, with the optimizer's recipe as it is. Each engine has processes of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from dist_llm.config.engine_rules import ENGINES
from dist_llm.config.run import RunConfig
from dist_llm.data.prepare import prepare
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.engine.build import build_engine
from dist_llm.errors import EngineUnavailable
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.compare import largest_gap, tensor_gaps, worst_gap
from dist_llm.train.engine_cases import PRECISION, Plan, plan_comparison
from dist_llm.train.engines import REFERENCE, Build, on_engine
from dist_llm.train.layouts import Case, case_config
from dist_llm.train.trace import KEY_BIAS, Rectangle, has_idle_key_bias
from dist_llm.train.verify import excluded_settings
from dist_llm.train.verify_resume import Leg, Outcome, run_leg


@dataclass(frozen=True)
class EngineBounds:
    """Largest relative differences between two engines; weights: ||a - b|| / ||b|| of each logical tensor."""

    loss: float = 2e-5
    grad_norm: float = 1e-4
    weights: float = 1e-4


BOUNDS = EngineBounds()
"""Engines add the same numbers up in other orders than a layout of the native engine does, so these are wider."""


@dataclass(frozen=True)
class Curve:
    """What is kept of a run: loss and gradient norm of each step by rank, the weights at the end, and its time."""

    losses: list[list[float]]
    grad_norms: list[list[float]]
    weights: list[Rectangle]
    seconds: float


def verify_engine(
    config: RunConfig,
    *,
    engines: Sequence[str] = ENGINES,
    layouts: str = "all",
    steps: int = 20,
    switch: bool = True,
    report: Callable[[str], None] = lambda message: None,
    build: Build = build_engine,
) -> dict[str, object]:
    """Train `steps` steps on every engine in the layouts that they share; return the differences as JSON-able facts.

    switch: also resume each engine's checkpoint of half way on each other engine. build: what makes an engine.
    Raises ConfigError, before anything is started, where there are no two engines to compare.
    """
    plan = plan_comparison(config, engines, layouts)
    for name, why in plan.left_out.items():
        report(f"left out: {name}: {why}")
    prepared = prepare(config.data, config.tokenizer, config.model.vocab_size, report)
    source = (prepared.prefix, Tokenizer.load(prepared.tokenizer_path).eos_id)
    with tempfile.TemporaryDirectory() as folder:
        comparison = _Comparison(config, source, Path(folder), (steps, switch and steps > 1), report, build)
        plan = comparison.train(plan)
        rows = list(comparison.differences(plan))
        switches = list(comparison.switched(plan)) if comparison.half else []
    return {
        "ok": all(row["ok"] for row in (*rows, *switches)),
        "reference": REFERENCE,
        "precision": PRECISION,
        "steps": steps,
        "bounds": asdict(BOUNDS),
        "layouts": rows,
        "switches": switches,
        "excluded": excluded_settings(config, PRECISION),
        "left_out": plan.left_out,
        "not_shared": plan.not_shared,
    }


@dataclass
class _Comparison:
    """The runs of a comparison: of each engine in turn, with ranks of its own, so that no library meets another."""

    config: RunConfig
    source: tuple[Path, int]
    folder: Path
    length: tuple[int, bool]
    report: Callable[[str], None]
    build: Build
    runs: dict[tuple[str, str], Curve] = field(default_factory=dict)

    @property
    def half(self) -> int:
        """The step after which engines are switched; 0: they are not."""
        steps, switch = self.length
        return steps // 2 if switch else 0

    def _run(self, pool: WorkerPool, engine: str, each: Case, root: Path, leg: Leg) -> Curve:
        began = time.perf_counter()
        config = on_engine(case_config(self.config, each, PRECISION), engine)
        outcomes: list[Outcome] = pool.run(run_leg, config, *self.source, root, leg, self.build, world=each.ranks)
        return Curve(
            [list(outcome.losses.values()) for outcome in outcomes],
            [list(outcome.grad_norms.values()) for outcome in outcomes],
            [(name[6:], *rest) for outcome in outcomes for name, *rest in outcome.state if name[:6] == "model."],  # type: ignore[misc]
            round(time.perf_counter() - began, 2),
        )

    def train(self, plan: Plan) -> Plan:
        """Run every engine alone in its layouts; return the plan without those that could not be built after all."""
        for engine in plan.engines:
            cases = plan.cases(engine)
            saves = [each.name for one, _, each in plan.switches() if one == engine and self.half]
            ranks = max((each.ranks for each in cases), default=1)
            try:
                with WorkerPool(ranks, timeout_seconds=300.0) as pool:
                    # So that no layout's seconds hold the start of the ranks.
                    pool.run(dist.get_rank, world=ranks)
                    for each in cases:
                        leg = Leg(0, self.length[0], self.half if each.name in saves else None)
                        run = self._run(pool, engine, each, self._root(engine, each), leg)
                        self.runs[engine, each.name] = run
                        self.report(f"trained on {engine}: {each.name} ({run.seconds:g} s)")
            except EngineUnavailable as error:
                plan = plan.without(engine, str(error))
                self.report(f"left out: {engine}: {error}")
        return plan

    def _root(self, engine: str, each: Case) -> Path:
        return self.folder / f"{engine}-{each.name.replace(' ', '_')}"

    def differences(self, plan: Plan) -> Iterator[dict[str, object]]:
        """Yield how far each engine is from the reference in each layout."""
        left_out = self._idle_biases()
        for shared in plan.shared:
            name = shared.case.name
            one = self.runs[REFERENCE, name]
            for engine in shared.engines[1:]:
                run = self.runs[engine, name]
                weight, worst = worst_gap(tensor_gaps(run.weights, one.weights, left_out))
                row: dict[str, object] = {"layout": name, "engine": engine, **_gaps(run, one, 0)}
                row.update(weights=weight, worst_weight=worst, seconds=run.seconds)
                yield self._judged(row)

    def switched(self, plan: Plan) -> Iterator[dict[str, object]]:
        """Go on with each engine's checkpoint on every other; yield how far that is from not switching."""
        switches = list(plan.switches())
        for engine in plan.engines:
            mine = [(one, each) for one, other, each in switches if other == engine]
            ranks = max((each.ranks for _, each in mine), default=1)
            with WorkerPool(ranks, timeout_seconds=300.0) as pool:
                pool.run(dist.get_rank, world=ranks)
                for one, each in mine:
                    run = self._run(pool, engine, each, self._root(one, each), Leg(self.half, self.length[0]))
                    row: dict[str, object] = {"layout": each.name, "saved_by": one, "resumed_by": engine}
                    row.update(_gaps(run, self.runs[one, each.name], self.half), seconds=run.seconds)
                    yield self._judged(row)

    def _judged(self, row: dict[str, object]) -> dict[str, object]:
        """Return a row with its verdict; JSON has no word for what is not a number, so its gap is None."""
        row["ok"] = all(float(str(row.get(name, 0.0))) <= bound for name, bound in asdict(BOUNDS).items())
        gaps = "  ".join(f"{name.replace('_', ' ')} {row[name]:.1e}" for name in asdict(BOUNDS) if name in row)
        engines = " to ".join(str(row[name]) for name in ("engine", "saved_by", "resumed_by") if name in row)
        self.report(f"{'same' if row['ok'] else 'DIFFERENT':9} {gaps}  {engines}  {row['layout']}")
        return {name: None if value == float("inf") else value for name, value in row.items()}

    def _idle_biases(self) -> set[str]:
        """Return the names of key biases without a true gradient, whose weights say nothing."""
        if not has_idle_key_bias(self.config.model):
            return set()
        return {name for run in self.runs.values() for name, *_ in run.weights if name.endswith(KEY_BIAS)}


def _gaps(run: Curve, other: Curve, since: int) -> dict[str, float]:
    """Return the largest relative differences of loss and gradient norm from step `since` of the other run on."""
    return {
        "loss": max(largest_gap(losses, other.losses[0][since:]) for losses in run.losses),
        "grad_norm": max(largest_gap(norms, other.grad_norms[0][since:]) for norms in run.grad_norms),
    }
