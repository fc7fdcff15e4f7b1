"""The layouts that `verify engine` compares engines in: a list to read, and which engines share which of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from dist_llm.config.engine_rules import ENGINES
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.train.engines import REFERENCE, problems, said, with_reference
from dist_llm.train.layouts import Case, baseline, case, case_config, given, misfit

PRECISION = "fp32"
"""The format that engines are compared in."""

_STAGES: dict[str, object] = {"pipeline": 2}
CASES: tuple[Case, ...] = (
    case("as-given", 2, 2, data=2, zero=1),
    case("as-given", 2, 2, data=2, zero=2),
    case("as-given", 2, 2, data=2, zero=3),
    case("as-given", 4, 2, tensor=2, data=2, zero=1),
    case("as-given", 4, 2, tensor=2, data=2, zero=2),
    case("as-given", 4, 2, tensor=2, data=2, zero=3),
    case("as-given", 2, 2, tensor=2, sequence=True),
    case("as-given", 2, 4, **_STAGES),
    case("as-given", 2, 4, **_STAGES, virtual_pipeline=2, schedule="interleaved"),
    case("as-given", 4, 4, **_STAGES, data=2, zero=1),
    case("as-given", 8, 4, tensor=2, sequence=True, **_STAGES, data=2, zero=1),
    case("as-given", 2, 2, context=2),
)
"""Small layouts that engines may share; the first that a pair shares is the one that it is switched in."""
EXPERT_CASES: tuple[Case, ...] = (case("as-given", 2, 2, data=2, expert=2, zero=1),)
"""Those of a model with experts, too."""


@dataclass(frozen=True)
class Shared:
    """A layout and the engines that are compared in it, the reference first."""

    case: Case
    engines: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be run. left_out: why an engine is not compared, by its name; not_shared: by engine and layout."""

    engines: tuple[str, ...]
    shared: tuple[Shared, ...]
    left_out: dict[str, str]
    not_shared: dict[str, str]

    def without(self, engine: str, why: str) -> Plan:
        """Return the plan without an engine. Raises ConfigError where no two are left that share a layout."""
        engines = tuple(name for name in self.engines if name != engine)
        left_out = {**self.left_out, engine: why}
        require_two(engines, left_out)
        fewer = (replace(each, engines=tuple(name for name in each.engines if name != engine)) for each in self.shared)
        shared = tuple(each for each in fewer if len(each.engines) > 1)
        require_two(engines if shared else engines[:1], left_out)
        return replace(self, engines=engines, shared=shared, left_out=left_out)

    def cases(self, engine: str) -> list[Case]:
        """Return the layouts that an engine is run in."""
        return [each.case for each in self.shared if engine in each.engines]

    def switches(self) -> Iterator[tuple[str, str, Case]]:
        """Yield every ordered pair of engines that share a layout, with the first that they share."""
        for one, other in permutations(self.engines, 2):
            both = next((each.case for each in self.shared if {one, other} <= set(each.engines)), None)
            if both is not None:
                yield one, other, both


def require_two(engines: Sequence[str], left_out: Mapping[str, str]) -> None:
    """Raise ConfigError, with why the others are left out, unless there are two engines to compare."""
    if len(engines) < 2:
        reasons = "".join(f"\n  {name}: {why}" for name, why in left_out.items())
        able = f"only {engines[0]} can" if engines else "none can"
        raise ConfigError(f"there are no two engines to compare: {able} train this config here{reasons}")


def choose(config: RunConfig, layouts: str) -> list[Case]:
    """Return the layouts of the list and then the config's own, or those whose name contains `layouts`."""
    own = given(config)
    listed = [*CASES, *(EXPERT_CASES if config.model.num_expert_layers else ())]
    cases = [*listed, *([own] if own.ranks > 1 and not any(own.is_like(each) for each in listed) else [])]
    named = [each for each in cases if layouts == "all" or layouts in each.name]
    if not named:
        rule = "is in the name of no layout"
        raise ConfigError([Violation("--layouts", layouts, rule, tuple(each.name for each in cases[:3]))])
    return named


def plan_comparison(config: RunConfig, engines: Sequence[str] = ENGINES, layouts: str = "all") -> Plan:
    """Return which engines are compared in which layouts; nothing is started.

    layouts: `all`, or text that the name of a layout must contain. Raises ConfigError where no two engines are left, or
    no layout that they share with the native one.
    """
    left_out: dict[str, str] = {}
    for name in with_reference(engines):
        # In one process no rule about layouts is broken: what then is, no layout mends.
        if violations := problems(case_config(config, baseline("as-given"), PRECISION), 1, name):
            left_out[name] = said(violations)
    usable = tuple(name for name in with_reference(engines) if name not in left_out)
    require_two(usable, left_out)
    shared: list[Shared] = []
    not_shared: dict[str, str] = {}
    for each in choose(config, layouts):
        reasons = {name: _refusal(config, each, name) for name in usable}
        able = tuple(name for name, reason in reasons.items() if not reason)
        if REFERENCE in able and len(able) > 1:
            shared.append(Shared(each, able))
        not_shared.update({f"{name}: {each.name}": reason for name, reason in reasons.items() if reason})
    if not shared:
        name, reason = next(iter(not_shared.items()))
        raise ConfigError([Violation("--layouts", layouts, f"is none that engines share: {name}: {reason}")])
    return Plan(usable, tuple(shared), left_out, not_shared)


def _refusal(config: RunConfig, each: Case, engine: str) -> str:
    """Return why an engine cannot try a layout; "" where it can."""
    return misfit(config, each) or said(problems(case_config(config, each, PRECISION), each.ranks, engine))
