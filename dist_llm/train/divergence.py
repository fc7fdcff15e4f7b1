"""Where a layout first differs from one process: at which step, in which phase, which tensor, over which axis.

step       the smallest number of steps after which something is beyond the bounds, by bisection
phase      forward: a part's output or the loss | gradient: a tensor's, or the norm of all | update: a weight
parameter  the first in forward order that differs (a part of the model, in the forward)
axis       along which replicas differ from each other; else what, taken away, makes the difference go away
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dist_llm.accounting.params import list_parameters
from dist_llm.config.model import ModelConfig
from dist_llm.train.compare import (
    BOUNDS,
    Bounds,
    finite,
    gradients_of,
    key_bias_share,
    largest_gap,
    tensor_gaps,
    weights_of,
    without_gradient,
)
from dist_llm.train.layouts import Case, baseline
from dist_llm.train.trace import Trace

Run = Callable[[Case, int, int], list[Trace]]
"""(case, steps, the step to look at) to the traces of its ranks."""

AXES: dict[str, tuple[str, ...]] = {
    "recompute": ("recompute", "recompute_operators", "recompute_layers"),
    "ep": ("expert",),
    "cp": ("context", "context_method", "context_heads"),
    "dp": ("data", "replicate"),
    "pp": ("pipeline", "virtual_pipeline", "schedule"),
    "tp": ("tensor", "sequence"),
}
"""Settings that go when an axis is taken away; any other setting of a case is an axis of its own name."""


@dataclass(frozen=True)
class Divergence:
    """The first difference beyond the bounds.

    step: 1 is the first. gap: relative. differing: how many tensors of that phase are beyond the bound. evidence: how
    the axis was found. smallest_layout: what is left of the layout when all that can go without mending it is gone.
    """

    step: int
    phase: str
    parameter: str
    axis: str
    gap: float
    differing: int
    evidence: str
    smallest_layout: str


@dataclass(frozen=True)
class _Finding:
    phase: str
    parameter: str
    gap: float
    differing: int


def first_divergence(
    run: Run, is_legal: Callable[[Case], bool], case: Case, model: ModelConfig, steps: int, precision: str
) -> dict[str, object] | None:
    """Return where a case first differs as JSON-able facts, None where nothing is seen to. Runs jobs of a few steps."""
    search = _Search(run, is_legal, model, _diagnostic(BOUNDS[precision]))
    step = search.first_step(case, steps)
    if step is None:
        return None
    finding, traces = search.at(case, step)
    assert finding is not None
    axis = _drifting_axis(traces, finding.phase, search.bounds)
    evidence = "replicas differ" if axis else "without it they agree"
    smallest, found = search.take_apart(case, step)
    words = " ".join(f"{key}={value}" for key, value in smallest.parallel.items())
    where = (finding.phase, finding.parameter, axis or found, finite(finding.gap), finding.differing)
    return asdict(Divergence(step + 1, *where, evidence, words))


def _diagnostic(bounds: Bounds) -> Bounds:
    """Return bounds for everything, also for what a verdict leaves open."""
    gradients = bounds.gradients if math.isfinite(bounds.gradients) else 1e-4
    weights = bounds.weights if math.isfinite(bounds.weights) else 0.5
    return replace(bounds, gradients=gradients, weights=weights)


class _Search:
    """Runs a case and one process for a few steps and compares the last."""

    def __init__(self, run: Run, is_legal: Callable[[Case], bool], model: ModelConfig, bounds: Bounds) -> None:
        self._run, self._is_legal, self.bounds = run, is_legal, bounds
        self._order = _forward_order(model)
        self._references: dict[tuple[str, int], list[Trace]] = {}
        self._latest: tuple[tuple[str, int], _Finding | None, list[Trace]] | None = None

    def at(self, case: Case, step: int) -> tuple[_Finding | None, list[Trace]]:
        """Return what differs at a step, and the traces of the case."""
        what, key = (case.name, step), (case.variant, step)
        if self._latest is None or self._latest[0] != what:
            if key not in self._references:
                self._references[key] = self._run(baseline(case.variant), step + 1, step)
            traces = self._run(case, step + 1, step)
            self._latest = (what, self._finding(traces, self._references[key]), traces)
        return self._latest[1:]

    def first_step(self, case: Case, steps: int) -> int | None:
        """Return the first step (from 0) that differs, taking it that what differs once goes on to."""
        if self.at(case, 0)[0] is not None:
            return 0
        low, high = 0, steps - 1
        if high == 0 or self.at(case, high)[0] is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(case, middle)[0] is not None else (middle, high)
        return high

    def take_apart(self, case: Case, step: int) -> tuple[Case, str]:
        """Return the smallest layout that still differs, and the axes without which it would not."""
        mending: list[str] = []
        for axis, keys in self._parts(case):
            smaller = _without(case, keys)
            if smaller.settings == case.settings or not self._is_legal(smaller):
                continue
            if self.at(smaller, step)[0] is not None:
                case = smaller
            else:
                mending.append(axis)
        return case, " x ".join(axis for axis in mending if axis not in ("zero", "sequence")) or "accumulation"

    @staticmethod
    def _parts(case: Case) -> list[tuple[str, tuple[str, ...]]]:
        known = {key for keys in AXES.values() for key in keys} | {"zero"}
        others = [(key, (key,)) for key in case.parallel if key not in known]
        return [*others, *AXES.items(), ("sequence", ("sequence",))]

    def _finding(self, ours: list[Trace], theirs: list[Trace]) -> _Finding | None:
        """Return the first phase with something beyond its bound, and the first tensor of it in forward order."""
        bounds, left_out = self.bounds, without_gradient(theirs)
        loss = max(largest_gap(trace.losses[-1:], theirs[0].losses[-1:]) for trace in ours)
        norm = max(largest_gap(trace.grad_norms[-1:], theirs[0].grad_norms[-1:]) for trace in ours)
        outputs = _relative(_outputs(ours), _outputs(theirs))
        gradients = tensor_gaps(gradients_of(ours), gradients_of(theirs), left_out)
        weights = tensor_gaps(weights_of(ours), weights_of(theirs), left_out)
        return (
            self._first("forward", outputs, bounds.loss)
            or self._first("forward", {"head": loss}, bounds.loss)
            or self._first("gradient", gradients, bounds.gradients)
            or self._first("gradient", {"the norm of all": norm}, bounds.grad_norm)
            or self._first("gradient", {"attention.wk.bias": key_bias_share(ours)}, bounds.key_bias_gradient)
            or self._first("update", weights, bounds.weights)
        )

    def _first(self, phase: str, gaps: dict[str, float], bound: float) -> _Finding | None:
        beyond = [name for name, gap in gaps.items() if gap > bound]
        if not beyond:
            return None
        first = min(beyond, key=lambda name: (self._place(name), name))
        return _Finding(phase, first, gaps[first], len(beyond))

    def _place(self, name: str) -> int:
        """Return how many parameters come before a parameter or part in forward order."""
        places = (at for at, known in enumerate(self._order) if known == name or known.startswith(f"{name}."))
        module = name.rpartition(".")[0]
        near = (at for at, known in enumerate(self._order) if known.startswith(f"{module}."))
        return next(places, next(near, len(self._order)))


def _forward_order(model: ModelConfig) -> list[str]:
    """Return the parameters in the order in which a forward meets them: norms before what they feed."""

    def key(name: str) -> tuple[int, int, int]:
        words = name.split(".")
        if words[0] != "layers":
            return (0 if words[0] == "embed" else 2, 0, 0)
        halves = ("attention_norm", "attention", "mlp_norm", "mlp")
        return (1, int(words[1]), halves.index(words[2]))

    return sorted((spec.name for spec in list_parameters(model)), key=key)


def _outputs(traces: Sequence[Trace]) -> dict[str, float]:
    """Return the squares of every part's output over all tokens, the mean of those that tp ranks have alike."""
    total: dict[str, float] = {}
    looks = [trace.look for trace in traces if trace.look is not None]
    tp = max((look.place["tp"] for look in looks), default=0) + 1
    for look in looks:
        for name, squares in look.outputs.items():
            total[name] = total.get(name, 0.0) + squares / (1 if look.spread else tp)
    return total


def _relative(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    return {name: finite(abs(ours.get(name, math.nan) - there) / (there or 1.0)) for name, there in theirs.items()}


def _drifting_axis(traces: Sequence[Trace], phase: str, bounds: Bounds) -> str:
    """Return the axis along which replicas of a tensor differ in a phase; "" where all replicas agree."""
    groups: dict[Any, list[tuple[dict[str, int], float]]] = {}
    for look in (trace.look for trace in traces):
        if look is None:
            continue
        if phase == "forward" and not look.spread:
            for name, squares in look.outputs.items():
                rest = (look.place["pp"], look.place["dp"], look.place["cp"])
                groups.setdefault((name, rest), []).append((look.place, squares))
        for held in look.held:
            if held.phase == phase:
                groups.setdefault((held.name, held.offsets), []).append((look.place, held.squares))
    bound = {"forward": bounds.loss, "gradient": bounds.gradients}.get(phase, bounds.weights)
    return next((axis for members in groups.values() for axis in _axes_apart(members, bound)), "")


def _axes_apart(members: list[tuple[dict[str, int], float]], bound: float) -> Iterable[str]:
    """Yield the axes along which two members that differ in nothing else hold different values."""
    for axis in ("tp", "cp", "dp", "pp"):
        for place, value in members:
            for other, theirs in members:
                alone = place[axis] != other[axis] and {**place, axis: 0} == {**other, axis: 0}
                if alone and abs(value - theirs) > bound * max(abs(value), abs(theirs)):
                    yield axis


def _without(case: Case, keys: tuple[str, ...]) -> Case:
    """Return a case without some settings, on as many ranks as are left."""
    parallel = {key: value for key, value in case.parallel.items() if key not in keys}
    ranks = math.prod(int(str(parallel.get(key, 1))) for key in ("tensor", "pipeline", "context", "data"))
    return Case(case.variant, parallel, ranks, case.accumulation)
