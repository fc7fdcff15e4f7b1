"""Which layouts of a model on so many ranks are legal: every combination that breaks none of config/rules.py.

    tensor, context, pipeline and data multiply to the ranks; schedule and chunks; sequence, context method and heads,
    expert; zero and replicate

Settings are chosen in that order, and a rule is asked as soon as all that it reads is chosen, so a wrong split is left
before its schedules are tried. Of chunks those that cut all stages alike are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_llm.config.checks import check
from dist_llm.config.parallel import V_SCHEDULES, ParallelConfig
from dist_llm.config.rule import RANKS, Rule
from dist_llm.config.rules import LAYOUT_RULES, divisors
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
    """Whether a config's own layout is legal, every rule that it breaks, and the legal layouts nearest to it."""

    violations: tuple[Violation, ...]
    nearest: tuple[Choice, ...]

    @property
    def legal(self) -> bool:
        """Whether it breaks no rule."""
        return not self.violations


def legal_layouts(config: RunConfig, ranks: int) -> list[Choice]:
    """Return every legal layout of the config's model and batch on `ranks` ranks, as settings of `parallel`.

    What no layout can mend, a rule on other settings alone, is left to `judge_layout`.
    """
    found: list[Choice] = []
    chosen: set[str] = set()
    asked: list[list[Rule]] = []
    for names in _ORDER:
        chosen.update(names)
        before = [rule for rules in asked for rule in rules]
        asked.append([rule for rule in LAYOUT_RULES if rule not in before and _reads_only(rule, chosen)])
    rest = [rule for rule in LAYOUT_RULES if not any(rule in rules for rules in asked)]
    asked[-1].extend(rule for rule in rest if any(f"parallel.{name}" in rule.keys for name in _NAMES))
    _extend(_Judge(config, ranks), asked, {}, found)
    return found


def judge_layout(config: RunConfig, ranks: int, layouts: Sequence[Choice], most: int = 3) -> Verdict:
    """Return the verdict on the config's own layout; `layouts` are the legal ones."""
    violations = tuple(check(config, ranks))
    own = {**config.parallel.model_dump(), "virtual_pipeline": config.parallel.chunks}

    def distance(layout: Choice) -> tuple[int, float]:
        changed = [name for name, value in layout.items() if own[name] != value and name != "data"]
        sizes = [name for name in ("tensor", "context", "pipeline") if name in changed]
        return len(changed), sum(abs(float(str(layout[name])) - float(own[name])) for name in sizes)

    nearest = sorted(layouts, key=distance)[:most] if violations else []
    return Verdict(violations, tuple(nearest))


def _reads_only(rule: Rule, chosen: set[str]) -> bool:
    keys = [key.removeprefix("parallel.") for key in rule.keys if key.startswith("parallel.")]
    return all(key in chosen for key in keys) and bool(keys or RANKS in rule.keys)


class _Judge:
    """Whether a rule holds for a choice, asked once for all choices that agree in what the rule reads."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        self.config, self.ranks = config, ranks
        self._known: dict[tuple[object, ...], bool] = {}
        self._reads = {rule.name: [name for name in _NAMES if f"parallel.{name}" in rule.keys] for rule in LAYOUT_RULES}

    def holds(self, rule: Rule, choice: Choice) -> bool:
        """Return whether the rule holds for a choice of all that it reads."""
        key = (rule.name, *[choice[name] for name in self._reads[rule.name]])
        if key not in self._known:
            parallel = self.config.parallel.model_copy(update={**_PLAIN, **choice})
            self._known[key] = not rule(self.config.model_copy(update={"parallel": parallel}), self.ranks)
        return self._known[key]


def _extend(judge: _Judge, asked: list[list[Rule]], choice: Choice, found: list[Choice]) -> None:
    """Add every legal completion of a choice."""
    depth = sum(names[0] in choice for names in _ORDER)
    if depth == len(_ORDER):
        found.append(choice)
        return
    for more in _OPTIONS[depth](judge.config, judge.ranks, choice):
        wider = {**choice, **more}
        if all(judge.holds(rule, wider) for rule in asked[depth]):
            _extend(judge, asked, wider, found)


_NAMES = tuple(name for names in _ORDER for name in names)
_PLAIN: Choice = {name: getattr(ParallelConfig(), name) for name in _NAMES[4:]}


def _splits(config: RunConfig, ranks: int, choice: Choice) -> Iterator[Choice]:
    for tensor in divisors(ranks):
        for context in divisors(ranks // tensor):
            for pipeline in divisors(ranks // tensor // context):
                data = ranks // tensor // context // pipeline
                yield {"tensor": tensor, "context": context, "pipeline": pipeline, "data": data}


def _schedules(config: RunConfig, ranks: int, choice: Choice) -> Iterator[Choice]:
    pipeline = int(str(choice["pipeline"]))
    if pipeline == 1:
        yield {"schedule": "1f1b", "virtual_pipeline": 1}
        return
    chunks = divisors(max(1, config.model.num_layers // pipeline))
    for schedule in ("gpipe", "1f1b"):
        yield {"schedule": schedule, "virtual_pipeline": 1}
    for number in chunks:
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


_OPTIONS = (_splits, _schedules, _regions, _shards)
