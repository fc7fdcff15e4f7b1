"""Hydra, and nothing but Hydra: presets and overrides into one plain tree. The only file that imports it.

    conf/config.yaml + group presets (Hydra's defaults lists) < experiment < group=choice < key=value, left to right

Values are parsed by Hydra's grammar, but only plain ones are kept: no sweep, function, interpolation or deletion.
`--config FILE` takes the place of the presets. Invariant: Hydra sees no string but names of presets that exist.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dist_llm
from dist_llm.config.document import read_document
from dist_llm.config.keys import takes_text
from dist_llm.config.wording import shown
from dist_llm.errors import ConfigError, Violation

EXPERIMENT = "experiment"
HARDWARE, FILE_ENDING = "cluster", ".yaml"
"""The group whose choice may be a file, as `dist-llm plan calibrate --write` writes it, and how its name ends."""
MAX_OVERRIDE = 4096
MOST_SHOWN = 6

_REFUSED = object()
"""Stands for the value of an override that has none."""

_FORMER = {"cluster": {"h200-sxm": "h200", "b200-sxm": "b200"}}
"""What presets were called before."""

_KEY = re.compile(r"(?:\+\+?)?([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)", re.ASCII)


@dataclass
class Composed:
    """The tree, what was wrong with the overrides, and the keys or sections that therefore hold no meant value."""

    tree: dict[str, Any]
    violations: list[Violation] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)

    def refuse(self, violation: Violation, key: str | None = None) -> None:
        """Note a violation, and the key that it leaves without a value."""
        self.violations.append(violation)
        if key is not None:
            self.unusable.add(key)


def compose(overrides: Sequence[str], config_file: Path | None = None) -> dict[str, Any]:
    """Return the tree that presets (or `config_file`) and overrides make. Raises ConfigError with all that is wrong."""
    composed = compose_partly(overrides, config_file)
    if composed.violations:
        raise ConfigError(composed.violations)
    return composed.tree


def compose_partly(overrides: Sequence[str], config_file: Path | None = None) -> Composed:
    """Return as much of the tree as the overrides make, with a violation for each that cannot be used."""
    composed = Composed({})
    choices, values = _sort(overrides, list_presets(), composed)
    if config_file is None:
        composed.tree = _compose_presets(choices)
    else:
        composed.tree = read_document(config_file)
        _replace_sections(choices, config_file, composed)
    parser = OverridesParser.create()
    for key, raw in values:
        _assign(key, raw, parser, composed)
    return composed


def compose_request(overrides: Sequence[str]) -> Composed:
    """Return the tree of a request for a plan: `cluster` and `model` choose presets, all else is a value.

    A chosen model is `preset` in it, with the overrides of `model.*` on it; without one they are wishes.
    """
    composed = Composed({})
    presets = list_presets()
    choices, values = _sort(overrides, {group: presets[group] for group in ("cluster", "model")}, composed)
    sections = _compose_presets(choices)
    composed.tree = {"cluster": sections["cluster"]}
    if "model" in choices:
        composed.tree["preset"] = sections["model"]
    parser = OverridesParser.create()
    for key, raw in values:
        chosen = "model" in choices and key.startswith("model.")
        _assign(f"preset.{key.removeprefix('model.')}" if chosen else key, raw, parser, composed)
    return composed


def compose_sweep(file: Path) -> list[dict[str, Any]]:
    """Return the tree of every run of a Hydra multirun file: each combination of what `hydra.sweeper.params` sweeps.

    Its defaults lists name files beside it. Raises ConfigError where Hydra cannot compose it.
    """
    if not file.is_file():
        raise ConfigError([Violation("--multirun", str(file), "is no file; `dist-llm plan ladder --write` makes one")])
    try:
        with initialize_config_dir(config_dir=str(file.parent.resolve()), version_base="1.3"):
            swept = hydra_compose(file.stem, return_hydra_config=True).hydra.sweeper.params or {}
            words = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in swept.items()])
            sweeps = [[f"{word.get_key_element()}={value}" for value in _swept_values(word)] for word in words]
            trees = [OmegaConf.to_container(hydra_compose(file.stem, [*run])) for run in itertools.product(*sweeps)]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError([Violation("--multirun", str(file), f"does not compose: {error}")]) from error
    return [{str(key): value for key, value in tree.items()} for tree in trees if isinstance(tree, dict)]


def _swept_values(word: Override) -> list[str]:
    return [*word.sweep_string_iterator()] if word.is_sweep_override() else [word.get_value_element_as_str()]


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return overrides by key with typed values, groups' choices as text. Raises ConfigError with all that is wrong."""
    composed = Composed({})
    presets = list_presets()
    parser = OverridesParser.create()
    found: dict[str, Any] = {}
    for text in overrides:
        split = _split(text, composed)
        if split is None:
            continue
        key, raw = split
        if key in presets:
            chosen: dict[str, str] = {}
            _choose(key, raw, presets[key], chosen, composed)
            found.update(chosen)
            continue
        value = _value(key, raw, parser, composed)
        if value is not _REFUSED:
            found[key] = value
    if composed.violations:
        raise ConfigError(composed.violations)
    return found


def preset_folder() -> Path:
    """Return `conf/`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(dist_llm.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"this installation has no presets: there is no conf/ in {package} or beside it")


def list_presets() -> dict[str, tuple[str, ...]]:
    """Return the names of the presets of every group."""
    groups = sorted(entry for entry in preset_folder().iterdir() if entry.is_dir())
    return {group.name: tuple(sorted(file.stem for file in group.glob("*.yaml"))) for group in groups}


def _sort(
    overrides: Sequence[str], presets: Mapping[str, tuple[str, ...]], composed: Composed
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the presets that overrides choose by group, and the keys and raw values of all others, in order."""
    choices: dict[str, str] = {}
    values: list[tuple[str, str]] = []
    for text in overrides:
        split = _split(text, composed)
        if split is not None and split[0] in presets:
            _choose(*split, presets[split[0]], choices, composed)
        elif split is not None:
            values.append(split)
    return choices, values


def _split(text: str, composed: Composed) -> tuple[str, str] | None:
    """Return key and raw value of an override; note what is not one."""
    key, equals, raw = text.partition("=")
    match = _KEY.fullmatch(key)
    if len(text) > MAX_OVERRIDE:
        composed.refuse(Violation("argument", shown(text), f"is longer than {MAX_OVERRIDE} characters"))
    elif key.startswith("~"):
        composed.refuse(Violation("argument", shown(text), "deletes a setting, which no config lacks: set key=null"))
    elif not equals or match is None:
        words = "is not an override: write key=value, such as run.steps=100"
        composed.refuse(Violation("argument", shown(text) or "''", words))
    else:
        return match[1], raw
    return None


def _choose(group: str, raw: str, presets: tuple[str, ...], choices: dict[str, str], composed: Composed) -> None:
    """Note the preset that an override chooses for a group, or that there is no such preset."""
    name = raw[1:-1] if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"" else raw
    name = _FORMER.get(group, {}).get(name, name)
    if name in presets:
        choices[group] = name
    elif group == HARDWARE and name.endswith(FILE_ENDING):
        if Path(name).expanduser().is_file():
            choices[group] = name
        else:
            words = "is no file; `dist-llm plan calibrate RUN... --write` makes one"
            composed.refuse(Violation(group, shown(raw), words, presets[:MOST_SHOWN]), group)
    elif group == EXPERIMENT and name in ("null", ""):
        choices.pop(EXPERIMENT, None)
    else:
        near = difflib.get_close_matches(name, presets, n=MOST_SHOWN, cutoff=0.4)
        rest = [preset for preset in presets if preset not in near]
        legal = tuple((near + rest)[:MOST_SHOWN])
        words = f"is not one of the {len(presets)} presets of {group}"
        composed.refuse(Violation(group, shown(raw) or "''", words, legal), None if group == EXPERIMENT else group)


def _compose_presets(choices: dict[str, str]) -> dict[str, Any]:
    """Return what Hydra composes of the presets."""
    file = choices.get(HARDWARE, "") if choices.get(HARDWARE, "").endswith(FILE_ENDING) else None
    arguments = [f"{group}={name}" for group, name in choices.items() if file is None or group != HARDWARE]
    try:
        with initialize_config_dir(config_dir=str(preset_folder()), version_base="1.3"):
            config = hydra_compose("config", overrides=arguments)
        tree = OmegaConf.to_container(config, resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the presets in {preset_folder()} do not compose: {error}") from error
    assert isinstance(tree, dict)
    found = {str(key): value for key, value in tree.items()}
    return found if file is None else {**found, HARDWARE: read_document(Path(file).expanduser())}


def _replace_sections(choices: dict[str, str], config_file: Path, composed: Composed) -> None:
    """Put chosen presets in place of the sections of a config file."""
    experiment = choices.pop(EXPERIMENT, None)
    if experiment is not None:
        words = f"composes a whole run, as --config {config_file} does: give one of the two"
        composed.refuse(Violation(EXPERIMENT, experiment, words))
    if choices:
        chosen = _compose_presets(choices)
        composed.tree.update({group: chosen[group] for group in choices})


def _assign(key: str, raw: str, parser: OverridesParser, composed: Composed) -> None:
    """Set a key of the tree to the value of an override, or note why not."""
    value = _value(key, raw, parser, composed)
    if value is _REFUSED:
        return
    node: Any = composed.tree
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            outer = ".".join(sections[: depth + 1])
            composed.refuse(Violation(key, shown(raw), f"is inside {outer}, which is no section", (outer,)))
            return
    if isinstance(value, dict) and isinstance(node.get(name), dict):
        node[name] = {**node[name], **value}
    else:
        node[name] = value


def _value(key: str, raw: str, parser: OverridesParser, composed: Composed) -> Any:
    """Return the value of an override, or note why it has none and return `_REFUSED`."""
    if "${" in raw:
        words = "is refused: a config has no interpolation, write the value itself"
        composed.refuse(Violation(key, shown(raw), words), key)
        return _REFUSED
    try:
        value = _parse(key, raw, parser)
    except (HydraException, ValueError, RecursionError):
        words = "cannot be parsed: quote text with special characters, as in key='\"a, b\"'"
        composed.refuse(Violation(key, shown(raw), words), key)
        return _REFUSED
    if isinstance(value, Override):
        composed.refuse(Violation(key, shown(raw), "is a sweep: start one run a value (a list is [a,b])"), key)
        return _REFUSED
    return value


def _parse(key: str, raw: str, parser: OverridesParser) -> Any:
    """Return the value of an override; an `Override` when it is not one value but a sweep.

    Free text is taken as it stands (a path may hold anything), unless it is quoted or null.
    """
    if takes_text(key) and raw != "null" and raw[:1] not in ("'", '"'):
        return raw
    override = parser.parse_override(f"{key}={raw}")
    if override.is_sweep_override():
        return override
    return override.value()
