"""Which layouts of a model on so many ranks are legal: every combination that breaks none of config/rules.py.

    tensor, context, pipeline and data multiply to the ranks; schedule and chunks; sequence, context method and heads,
    expert; zero and replicate

Settings are chosen in that order, and a rule is asked as soon as all that it reads is chosen, so a wrong split is left
before its schedules are tried. Other settings of `parallel` stay as the config has them; one that breaks a rule is
mended first, and is then part of every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

from dist_llm.config.checks import RULES, check
from dist_llm.config.parallel import V_SCHEDULES, ParallelConfig
from dist_llm.config.rule import RANKS, Rule
from dist_llm.config.rules import divisors
from dist_llm.config.run import RunConfig
from dist_llm.errors import Violation

Choice = dict[str, object]
"""Some settings of `parallel`, by name."""

_ORDER: tuple[tuple[str, ...], ...] = (
    ("tensor", "context", "pipeline", "data"),
    ("schedule", "virtual_pipeline"),
    ("sequence", "context_method", "context_heads", "expert"),
    ("zero", "replicate"),
)


@dataclass(frozen=True)
class Verdict:
    """Whether a config's own layout is legal, every rule that it breaks, and the legal layouts nearest to it.

    elsewhere: of the broken rules those that no layout mends.
    """

    violations: tuple[Violation, ...]
    nearest: tuple[Choice, ...]
    elsewhere: tuple[Violation, ...] = ()

    @property
    def legal(self) -> bool:
        """Whether it breaks no rule."""
        return not self.violations


def legal_layouts(config: RunConfig, ranks: int) -> list[Choice]:
    """Return every legal layout of the config's model and batch on `ranks` ranks, as settings of `parallel`.

    None where a rule is broken that no layout mends.
    """
    mended = _mended(config, ranks)
    search = _Search(_with_parallel(config, mended), ranks)
    found: list[Choice] = [mended]
    for depth in range(len(_ORDER)):
        found = [{**choice, **more} for choice in found for more in search.completions(depth, choice)]
    return found


def judge_layout(config: RunConfig, ranks: int, layouts: Sequence[Choice], most: int = 3) -> Verdict:
    """Return the verdict on the config's own layout; `layouts` are the legal ones."""
    violations = tuple(check(config, ranks))
    elsewhere = () if layouts else tuple(_elsewhere(config, ranks, violations))
    return Verdict(violations, tuple(nearest_layouts(config, layouts, most)) if violations else (), elsewhere)


def nearest_layouts(config: RunConfig, layouts: Sequence[Choice], most: int) -> list[Choice]:
    """Return up to `most` layouts that change the fewest settings of the config's own, kinds last and sizes least."""
    own = {**config.parallel.model_dump(), "virtual_pipeline": config.parallel.chunks}
    kinds = ("schedule", "context_method")
    sizes = ("tensor", "context", "pipeline", "virtual_pipeline", "context_heads")

    def distance(layout: Any) -> tuple[int, int, int]:
        changed = [name for name in SETTINGS if name != "data" and own[name] != layout[name]]
        apart = sum(abs(layout[name] - own[name]) for name in sizes)
        return len(changed), sum(name in changed for name in kinds), apart

    return nsmallest(most, layouts, key=distance)


def _mended(config: RunConfig, ranks: int) -> Choice:
    """Return the settings of `parallel` beside those that are chosen here which break a rule, as they may be."""
    mended: Choice = {}
    while True:
        slips = [slip for rule in RULES for slip in rule(_with_parallel(config, mended), ranks) if slip.candidates]
        more = {slip.key.removeprefix("parallel."): slip.candidates[0] for slip in reversed(slips)}
        more = {name: value for name, value in more.items() if name in _OTHERS and name not in mended}
        if not more:
            return mended
        mended |= more


def _elsewhere(config: RunConfig, ranks: int, violations: Sequence[Violation]) -> Iterator[Violation]:
    """Yield the violations of rules that read no setting of a layout."""
    chosen = {RANKS, *(f"parallel.{name}" for name in SETTINGS)}
    fixed = [rule for rule in RULES if not chosen & {*rule.keys}]
    keys = {slip.key for rule in fixed for slip in rule(config, ranks)}
    yield from (violation for violation in violations if violation.key in keys)


def _with_parallel(config: RunConfig, choice: Choice) -> RunConfig:
    """Return the config with some settings of its layout changed."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=choice)})


class _Search:
    """Asks each rule once for all choices that agree in what it reads, as soon as all of that is chosen."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        self._config, self._ranks = config, ranks
        self._reads = {rule.name: [name for name in SETTINGS if f"parallel.{name}" in rule.keys] for rule in RULES}
        self._holds: dict[tuple[object, ...], bool] = {}
        self._found: dict[tuple[object, ...], list[Choice]] = {}
        # What reads nothing that is chosen here is asked at once: it holds for all layouts or for none.
        self._asked: list[list[Rule]] = [[] for _ in _ORDER]
        for rule in RULES:
            reads = [depth for depth, names in enumerate(_ORDER) if {*names} & {*self._reads[rule.name]}]
            self._asked[max(reads, default=0)].append(rule)

    def completions(self, depth: int, choice: Choice) -> list[Choice]:
        """Return the settings of a group of `_ORDER` that a choice of the groups before may have."""
        read = {*_OPTIONS[depth][1]}.union(*(self._reads[rule.name] for rule in self._asked[depth]))
        key = (depth, *[value for name, value in choice.items() if name in read])
        if key not in self._found:
            options = _OPTIONS[depth][0](self._config, self._ranks, choice)
            self._found[key] = [more for more in options if self._is_legal(depth, {**_PLAIN, **choice, **more})]
        return self._found[key]

    def _is_legal(self, depth: int, choice: Choice) -> bool:
        for rule in self._asked[depth]:
            key = (rule.name, *[choice[name] for name in self._reads[rule.name]])
            if key not in self._holds:
                self._holds[key] = not rule(_with_parallel(self._config, choice), self._ranks)
            if not self._holds[key]:
                return False
        return True


SETTINGS = tuple(name for names in _ORDER for name in names)
"""The settings that are chosen here."""
_OTHERS = frozenset(ParallelConfig.model_fields) - frozenset(SETTINGS)
_PLAIN: Choice = {name: getattr(ParallelConfig(), name) for name in SETTINGS if name not in _ORDER[0]}


def _splits(config: RunConfig, ranks: int, choice: Choice) -> Iterator[Choice]:
    for tensor in divisors(ranks):
        for context in divisors(ranks // tensor):
            for pipeline in divisors(ranks // tensor // context):
                data = ranks // tensor // context // pipeline
                yield {"tensor": tensor, "context": context, "pipeline": pipeline, "data": data}


def _schedules(config: RunConfig, ranks: int, choice: Choice) -> Iterator[Choice]:
    yield from pipeline_schedules(config.model.num_layers, int(str(choice["pipeline"])))


def pipeline_schedules(num_layers: int, pipeline: int) -> Iterator[Choice]:
    """Yield every schedule and number of chunks for so many layers on `pipeline` ranks."""
    if pipeline == 1:
        yield {"schedule": "1f1b", "virtual_pipeline": 1}
        return
    for schedule in ("gpipe", "1f1b"):
        yield {"schedule": schedule, "virtual_pipeline": 1}
    for number in range(1, num_layers // pipeline + 1):
        if number > 1:
            yield {"schedule": "interleaved", "virtual_pipeline": number}
        yield {"schedule": "zero_bubble", "virtual_pipeline": number}
    for schedule in V_SCHEDULES:
        yield {"schedule": schedule, "virtual_pipeline": 2}


def _regions(config: RunConfig, ranks: int, choice: Choice) -> Iterator[Choice]:
    experts = config.model.moe.num_experts
    for sequence in (False, True) if choice["tensor"] != 1 else (False,):
        for method, heads in _context_methods(int(str(choice["context"]))):
            for expert in divisors(experts) if experts else (1,):
                yield {"sequence": sequence, "context_method": method, "context_heads": heads, "expert": expert}


def _context_methods(context: int) -> Iterator[tuple[str, int]]:
    """Yield the methods with their number of ranks that exchange heads; of mixed those that are none of the others."""
    yield "ring", 1
    if context > 1:
        yield "ulysses", 1
        for heads in divisors(context)[1:-1]:
            yield "mixed", heads


def _shards(config: RunConfig, ranks: int, choice: Choice) -> Iterator[Choice]:
    for zero in (0, 1, 2, 3):
        for replicate in divisors(int(str(choice["data"]))) if zero else (1,):
            yield {"zero": zero, "replicate": replicate}


_OPTIONS: tuple[tuple[Callable[[RunConfig, int, Choice], Iterator[Choice]], tuple[str, ...]], ...] = (
    (_splits, ()),
    (_schedules, ("pipeline",)),
    (_regions, ("tensor", "context")),
    (_shards, ("data",)),
)
"""What each group may be, and what that reads of the groups before."""
