"""Which pairs of features the layouts of `verify layout` hold, and which pairs the rules forbid.

A feature is a model variant, or some settings of `parallel`: those named below, and every other setting that a case
changes, but for those that choose within a feature. Two features are a pair unless they set one thing to two values. A
pair is legal when some layout with both, and with at most two features more, breaks no rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from dist_llm.config.checks import check
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.run import RunConfig
from dist_llm.train.layouts import Case, case_config, misfit

SIZES = ("tensor", "pipeline", "context", "data", "expert", "replicate")
DEFAULTS = ParallelConfig().model_dump()
WITHIN = {"recompute_operators", "recompute_layers", "compile_backend", "unit_blocks", "prefetch"}
MOST_RANKS = 8


@dataclass(frozen=True, eq=False)
class Feature:
    """What a case may have: a variant, or settings."""

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    variant: str | None = None

    def of(self, case: Case) -> bool:
        """Say whether the case has it; a ZeRO stage only counts where there are replicas."""
        if self.variant is not None:
            return case.variant == self.variant
        there = case.settings
        if self.name.startswith("zero ") and there["data"] == there["context"] == 1:
            return False
        return all(there[key] > 1 if key in SIZES else there[key] == value for key, value in self.settings.items())  # type: ignore[operator]

    def excludes(self, other: Feature) -> bool:
        """Say whether no layout can have both, whatever the rules: one thing has one value."""
        if self.variant is not None and other.variant is not None:
            return True
        shared = self.settings.keys() & other.settings.keys()
        return any(self.settings[key] != other.settings[key] for key in shared)


Pair = tuple[Feature, Feature]

NAMED = (
    Feature("tensor", {"tensor": 2, "sequence": False}),
    Feature("sequence", {"tensor": 2, "sequence": True}),
    *(
        Feature(name, {"pipeline": 2, "schedule": name})
        for name in ("gpipe", "1f1b", "interleaved", "zbv", "dualpipev")
    ),
    Feature("zero_bubble", {"pipeline": 2, "schedule": "zero_bubble", "virtual_pipeline": 1}),
    Feature("zero_bubble chunks", {"pipeline": 2, "schedule": "zero_bubble", "virtual_pipeline": 2}),
    *(Feature(name, {"context": 2, "context_method": name}) for name in ("ring", "ulysses")),
    Feature("mixed", {"context": 4, "context_method": "mixed", "context_heads": 2}),
    Feature("expert", {"expert": 2}),
    Feature("data", {"data": 2}),
    *(Feature(f"zero {stage}", {"zero": stage}) for stage in range(4)),
    Feature("replicate", {"replicate": 2}),
)


def features(cases: Sequence[Case]) -> list[Feature]:
    """Return the named features, the variants, and every other setting that a case changes."""
    known = {key for feature in NAMED for key in feature.settings} | WITHIN
    variants = dict.fromkeys(case.variant for case in cases)
    others = dict.fromkeys(
        (key, value)
        for case in cases
        for key, value in case.parallel.items()
        if key not in known and value != DEFAULTS[key]
    )
    more = [Feature(f"{key} {value}", {key: value}) for key, value in others]
    return [*NAMED, *more, *(Feature(name, variant=name) for name in variants)]


def pairs(listed: Sequence[Feature]) -> list[Pair]:
    """Return all pairs that one layout could have."""
    return [(a, b) for a, b in combinations(listed, 2) if not a.excludes(b)]


def held(cases: Sequence[Case], listed: Sequence[Feature]) -> set[Pair]:
    """Return the pairs that occur in some case."""
    return {pair for case in cases for pair in pairs([feature for feature in listed if feature.of(case)])}


def build(chosen: Sequence[Feature]) -> Case | None:
    """Return the smallest case with these features, or None where two exclude each other."""
    if any(a.excludes(b) for a, b in combinations(chosen, 2)):
        return None
    parallel = {key: value for feature in chosen for key, value in feature.settings.items() if value != DEFAULTS[key]}
    if any(feature.name == "zero 1" for feature in chosen):
        parallel["zero"] = 1
    if parallel.get("schedule") == "interleaved":
        parallel["virtual_pipeline"] = 2
    if "replicate" in parallel:
        parallel["data"] = 4 if "expert" in parallel and "context" not in parallel else 2
    variant = next((feature.variant for feature in chosen if feature.variant is not None), "as-given")
    ranks = 1
    for key in ("tensor", "pipeline", "context", "data"):
        ranks *= int(str(parallel.get(key, 1)))
    return Case(variant, parallel, ranks, 2 if parallel.get("data") == 4 else 4)


def broken_rules(config: RunConfig, case: Case) -> list[str] | None:
    """Return what forbids a case, by the settings that its violations name; None where it is legal."""
    reason = misfit(config, case)
    if reason:
        return [reason]
    return sorted(violation.key for violation in check(case_config(config, case, "fp32"), case.ranks)) or None


def completions(pair: Pair, listed: Sequence[Feature]) -> Iterator[list[Feature]]:
    """Yield the pair, and the pair with one and with two features more."""
    for count in range(3):
        for more in combinations(listed, count):
            chosen = [*pair, *more]
            if not any(a.excludes(b) or a is b for a, b in combinations(chosen, 2)):
                yield chosen


def legal_case(config: RunConfig, pair: Pair, listed: Sequence[Feature]) -> Case | None:
    """Return a legal case that has both, or None."""
    for chosen in completions(pair, listed):
        case = build(chosen)
        fits = case is not None and case.ranks <= MOST_RANKS and all(feature.of(case) for feature in pair)
        if case is not None and fits and broken_rules(config, case) is None:
            return case
    return None


def suggest(config: RunConfig, missing: Sequence[Pair], listed: Sequence[Feature]) -> list[Case]:
    """Return cases that hold the missing pairs: each takes features as long as they add pairs and stay legal."""
    left, found = set(missing), []
    while left:
        seed = min(left, key=lambda pair: (pair[0].name, pair[1].name))
        first = legal_case(config, seed, listed)
        assert first is not None, seed
        best = first
        chosen = [feature for feature in listed if feature.of(first)]
        for _ in range(len(listed)):
            tried = [build([*chosen, more]) for more in listed if more not in chosen]
            legal = [
                case
                for case in tried
                if case is not None and case.ranks <= MOST_RANKS and broken_rules(config, case) is None
            ]
            gain = {id(case): len(left & held([case], listed)) for case in legal}
            wider = max(legal, key=lambda case: (gain[id(case)], -case.ranks), default=None)
            if wider is None or gain[id(wider)] <= len(left & held([best], listed)):
                break
            best, chosen = wider, [feature for feature in listed if feature.of(wider)]
        found.append(best)
        left -= held([best], listed)
    return found


def as_line(case: Case) -> str:
    """Return a case as a line of the list."""
    settings = ", ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in case.parallel.items()
    )
    return f'_case("{case.variant}", {case.ranks}, {case.accumulation}, {settings}),'
