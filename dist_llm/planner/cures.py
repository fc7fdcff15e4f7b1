"""What would mend a request that has no plan: each value that is proposed has been tried, and with it there is one.

Tried in this order, until something is found: what the refusal itself suspects or suggests; each setting of the
request, one at a time; the fewest settings that are to be changed together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations, islice
from typing import Any

from pydantic import ValidationError

from dist_llm.config.request import PlanRequest
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.pins import key_of, pins_of
from dist_llm.planner.values import given_settings, last_resorts, nearby

MOST_SECONDS, MORE_SECONDS = 2.0, 1.0
"""Processor time after which no single change is tried any more, and then none of several settings together."""

MOST_SHOWN = 3
"""Values of one setting, and settings beside the cause, that are proposed."""

MOST_TOGETHER = 8
"""Values of nodes, budget and memory, each, that are tried with all else free."""

SEVERAL = ("parallel", "model")
"""Sections of whose settings several values are proposed; of the others the first that will do."""

NOTHING = "; no single change that was tried leaves a plan"

HasPlan = Callable[[PlanRequest, float], bool]
"""Whether a request has a plan, as far as is known before this process time (time.process_time)."""

Change = Mapping[str, Any]
"""Values of settings, by key."""


class NoPlan(ConfigError):
    """There is no plan, as the violations say; their legal values are yet to be tried.

    suspects: settings one of which may be all that is to blame, and is then all that is said. instead: what else may
    be changed. too_little: whether a larger budget is what is missing.
    """

    def __init__(
        self,
        why: Sequence[Violation],
        suspects: Sequence[Violation] = (),
        instead: Sequence[Violation] = (),
        too_little: bool = False,
    ) -> None:
        super().__init__(list(why))
        self.suspects, self.instead, self.too_little = tuple(suspects), tuple(instead), too_little


def cured(request: PlanRequest, error: ConfigError, has_plan: HasPlan) -> ConfigError:
    """Return the error of a request without a plan, with those changes alone that have one."""
    why = error.violations
    if not why:
        return error
    tried = _Tried(request, has_plan)
    suspects, instead = (error.suspects, error.instead) if isinstance(error, NoPlan) else ((), ())
    if guilty := tried.curing(suspects):
        return ConfigError(guilty)
    stated = [replace(violation, legal=tried.values(violation.key, violation.legal)) for violation in why]
    cures = tried.curing(instead)
    if not cures and not any(violation.legal for violation in stated):
        others = (key for key in (*given_settings(request), *last_resorts(request)) if key not in {v.key for v in why})
        asked = (Violation(key, tried.value(key), "or change it", tuple(nearby(request, key))) for key in others)
        cures = list(islice(tried.each_curing(asked), MOST_SHOWN))
    if not cures and not any(violation.legal for violation in stated):
        tried.take_longer()
        cures = _together(tried, [*why, *suspects, *instead])
        stated = [violation for violation in stated if violation.key not in {cure.key for cure in cures}]
        if not cures:
            stated[0] = replace(stated[0], rule=stated[0].rule + NOTHING)
    return ConfigError([*stated, *cures])


class _Tried:
    """Changes of a request that have been tried, until time is up."""

    def __init__(self, request: PlanRequest, has_plan: HasPlan) -> None:
        self.request, self._has_plan = request, has_plan
        self._known: dict[tuple[tuple[str, str], ...], bool] = {}
        self._end = self._until = time.process_time() + MOST_SECONDS

    def take_longer(self) -> None:
        """Try MORE_SECONDS longer."""
        self._end = self._until = time.process_time() + MORE_SECONDS

    def value(self, key: str) -> Any:
        """Return what the request has for a key."""
        return _read(self.request, key)

    def plans(self, change: Change) -> bool:
        """Return whether the request with these values has a plan; False once time is up."""
        name = tuple(sorted((key, repr(value)) for key, value in change.items()))
        if name not in self._known:
            if time.process_time() > self._until:
                return False
            asked = _changed(self.request, change)
            self._known[name] = asked is not None and self._has_plan(asked, self._until)
        return self._known[name]

    def values(self, key: str, candidates: Iterable[Any]) -> tuple[Any, ...]:
        """Return the first of the candidates that have a plan, other than what the request has.

        They take no more than half of the time that is left, so that others are tried too.
        """
        current, now = self.value(key), time.process_time()
        self._until = now + (self._end - now) / 2
        found = (value for value in dict.fromkeys(candidates) if value != current and self.plans({key: value}))
        most = MOST_SHOWN if key.partition(".")[0] in SEVERAL or key == "data.microbatch" else 1
        values, self._until = tuple(islice(found, most)), self._end
        return values

    def each_curing(self, violations: Iterable[Violation]) -> Iterator[Violation]:
        """Yield those of which a value has a plan, with it. What is fixed of the layout is to blame if it may be free.

        Where it may, values are better than null.
        """
        pins = {key_of(name) for name in pins_of(self.request).values}
        for violation in violations:
            key = violation.key
            if key in pins and not self.plans({key: None}):
                continue
            values = self.values(key, violation.legal) or ((None,) if key in pins else ())
            if values:
                yield replace(violation, legal=values)

    def curing(self, violations: Iterable[Violation]) -> list[Violation]:
        """Return each_curing as a list."""
        return list(self.each_curing(violations))


def _together(tried: _Tried, said: Sequence[Violation]) -> list[Violation]:
    """Return the fewest settings found that leave a plan if all are changed, with what they are to be; or none."""
    request = tried.request
    change: dict[str, Any] = dict.fromkeys(given_settings(request))
    if not tried.plans(change):
        suggested = {violation.key: violation.legal for violation in said if violation.legal}
        others = {
            key: list(suggested.get(key) or nearby(request, key))[:MOST_TOGETHER] for key in last_resorts(request)
        }
        resorts = [{key: value} for key, values in others.items() for value in values]
        pairs = ({**one, **two} for one, two in combinations(resorts, 2) if one.keys() != two.keys())
        more = next((each for each in chain(resorts, pairs) if tried.plans({**change, **each})), None)
        if more is None:
            return []
        change |= more
    for key in [key for key in change if change[key] is None]:
        if len(change) > 1 and tried.plans(rest := {name: value for name, value in change.items() if name != key}):
            change = rest
    for key in [key for key in change if change[key] is None]:
        values = (value for value in nearby(request, key) if value is not None and value != tried.value(key))
        value = next((value for value in values if tried.plans({**change, key: value})), None)
        change[key] = value
    rules = {violation.key: violation.rule for violation in reversed(said)}
    return [
        Violation(key, tried.value(key), _with_others(rules.get(key, "must be changed"), key, change), (value,))
        for key, value in change.items()
    ]


def _with_others(rule: str, key: str, change: Change) -> str:
    others = [other for other in change if other != key]
    return f"{rule} together with {' and '.join(others)}" if others else rule


def _read(request: PlanRequest, key: str) -> Any:
    found: Any = request
    for part in key.split("."):
        found = getattr(found, part, None)
    return found


def _changed(request: PlanRequest, change: Change) -> PlanRequest | None:
    """Return the request with other values, None where it takes no such."""
    tree = {name: getattr(request, name) for name in PlanRequest.model_fields}
    try:
        for key, value in change.items():
            section, _, name = key.partition(".")
            if name:
                kind = type(tree[section])
                fields = {each: getattr(tree[section], each) for each in kind.model_fields}
                tree[section] = kind.model_validate({**fields, name: value})
            else:
                tree[section] = value
        return PlanRequest.model_validate(tree)
    except (ValidationError, AttributeError):
        return None
