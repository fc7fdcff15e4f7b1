"""The same config on another engine, and why an engine cannot run it: for commands that compare engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dist_llm.config.checks import check
from dist_llm.config.engine_rules import ENGINES
from dist_llm.config.operations import EngineConfig
from dist_llm.config.run import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.errors import ConfigError, Violation
from dist_llm.runtime.mesh import Mesh

Build = Callable[[RunConfig, Mesh], Engine]
"""What makes an engine of a config, such as `build_engine`; importable, so that ranks can call it."""

REFERENCE = "native"
"""The engine that others are compared with."""

OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "native": (),
    "deepspeed": ("offload_to", "nvme_path"),
    "megatron": ("transformer_engine", "fp8", "overlap"),
}
"""Settings of `engine` that mean something to each."""


def on_engine(config: RunConfig, name: str) -> RunConfig:
    """Return the run on the engine `name`; settings that are another engine's own go back to their defaults."""
    own = {key: getattr(config.engine, key) for key in OWN_SETTINGS[name]}
    return config.model_copy(update={"engine": EngineConfig.model_validate({"name": name, **own})})


def problems(config: RunConfig, ranks: int, name: str) -> list[Violation]:
    """Return what keeps an engine from running a config on `ranks` ranks, all of it."""
    return check(on_engine(config, name), ranks)


def said(violations: Iterable[Violation]) -> str:
    """Return violations as one line."""
    return "; ".join(map(str, violations))


def read_names(option: str, text: str) -> tuple[str, ...]:
    """Return the engines of a comma list, each once, in the order given; `all` is every one. Raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        return ENGINES
    for name in names:
        if name not in ENGINES:
            words = "is no engine: a comma list of engines, or all"
            raise ConfigError([Violation(option, name or "''", words, (*ENGINES, "all"))])
    return tuple(dict.fromkeys(names))


def with_reference(names: Sequence[str]) -> tuple[str, ...]:
    """Return the engines with the one that the others are compared with, which comes first."""
    return (REFERENCE, *(name for name in names if name != REFERENCE))
