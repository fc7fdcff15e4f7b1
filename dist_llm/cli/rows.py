"""A row of settings, as JSON gives it, to a config and its ranks: as overrides do, thousands a minute.

    presets of the row's groups (composed once for each set of choices) < what a row leaves out < dotted keys, as typed

What a row leaves out, where it gives sizes of a model without a preset: the options of `model.family` (gpt2 unless
given), and of the sizes feed-forward 4 h (llama: 8/3 h, up to a multiple of 256), heads of 128 (or 64, or what else
divides), 51,200 tokens, positions for data.seq_len. On a CUDA cluster precision is bf16; chunks of a pipeline
rank are interleaved. Ranks: the product of parallel's axes, data from the launcher or the cluster's nodes if left out.
Where cluster.practice is megatron, software of 2021 to 2023: `dist-llm plan predict --help` has the rules.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dist_llm.config.checks import OF_THIS_MACHINE, RULES, violations_of
from dist_llm.config.decode import decode_partly
from dist_llm.config.engine_rules import ENGINE_RULES
from dist_llm.config.families import usual_ffn_width, usual_head_width
from dist_llm.config.run import RunConfig
from dist_llm.config.wording import shown
from dist_llm.errors import ConfigError, Violation

Tree = dict[str, Any]

_FAMILIES = {"gpt2": "gpt2-124m", "llama": "llama2-7b"}
"""The preset whose options a family has."""

_LITERAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null", re.IGNORECASE)
"""Text that JSON's grammar has a number, switch or null for."""

_SIZES = ("num_layers", "hidden_size", "family")
"""Settings that make a model without a preset."""
_VOCAB = 51200

_UNASKED = OF_THIS_MACHINE | {rule.name for rule in ENGINE_RULES}
"""Rules of what runs here and now, and of what the engines' present versions take: published runs had others."""

_UNFILLED = ("microbatches_fill_pipeline", ("gpipe", "1f1b"))
"""A rule of torch's schedules, and those of them whose time is plain without it: published runs have broken it."""


_LONGEST_SCORES = 4096
"""Tokens that Megatron-LM's softmax kernels of 2021 to 2023 took at the most; longer sequences had flash attention."""

_OURS = ("zero_bubble", "zbv", "dualpipev")
"""Schedules that are younger."""


def read_row(overrides: Mapping[str, object], file: Path | None = None) -> tuple[RunConfig, int]:
    """Return the config of a row and its number of ranks; file: a config in place of the presets, left as it is.

    Raises ConfigError with all that is wrong.
    """
    groups = _groups()
    choices = {key: value for key, value in overrides.items() if key in groups and isinstance(value, str)}
    settings = {key.lstrip("+"): _plain(value) for key, value in overrides.items() if key not in choices}
    base = _base(tuple(sorted((group, str(name)) for group, name in choices.items())), file)
    tree: Tree = {section: dict(held) if isinstance(held, dict) else held for section, held in base.items()}
    violations = [violation for key, value in settings.items() for violation in _assign(tree, key, value)]
    odd = [key for key, held in base.items() if isinstance(held, dict) and not isinstance(tree[key], dict)]
    if odd:
        violations += [Violation(key, shown(tree[key]), "is a section: set its settings, key.name") for key in odd]
        raise ConfigError(violations)
    if file is None:
        if not {"model", "experiment"} & {*choices} and any(f"model.{name}" in settings for name in _SIZES):
            tree["model"] = _sized_model(tree, settings)
        _complete(tree, settings, choices)
    decoded = decode_partly(tree)
    if problems := [*violations, *decoded.violations]:
        raise ConfigError(problems)
    ranks = ranks_of(decoded.config, settings if file is None else {**settings, "launcher.nproc": None})
    if broken := [*_too_many(decoded.config, ranks), *check_plan(decoded.config, ranks)]:
        raise ConfigError(broken)
    return decoded.config, ranks


def _too_many(config: RunConfig, ranks: int) -> Iterator[Violation]:
    """Yield what is wrong where a row gives a cluster's nodes and more ranks than they have devices."""
    nodes, each = config.cluster.nodes, config.cluster.devices_per_node
    if config.cluster.device == "cuda" and nodes is not None and each is not None and ranks > nodes * each:
        rule = f"have {nodes * each} devices for {ranks} ranks"
        yield Violation("cluster.nodes", nodes, rule, (-(-ranks // each),))


def check_plan(config: RunConfig, ranks: int) -> list[Violation]:
    """Return every rule that a run of the config breaks on `ranks` ranks, wherever and whenever it is run."""
    unasked = {*_UNASKED, *(_UNFILLED[:1] if config.parallel.schedule in _UNFILLED[1] else ())}
    return violations_of([rule for rule in RULES if rule.name not in unasked], config, ranks)


def ranks_of(config: RunConfig, settings: Mapping[str, object]) -> int:
    """Return the ranks of a config: its axes' product, with data from the launcher or the cluster's nodes, or 1.

    settings: what was said; the launcher counts where something of it was.
    """
    parallel, cluster, launcher = config.parallel, config.cluster, config.launcher
    if parallel.data is not None:
        return parallel.data * parallel.model_ranks
    if "launcher.nproc" in settings or "launcher.nodes" in settings:
        each = launcher.nproc if "launcher.nproc" in settings else cluster.devices_per_node or launcher.nproc
        return each * launcher.nodes
    if cluster.nodes is not None and cluster.devices_per_node is not None:
        return cluster.nodes * cluster.devices_per_node
    return parallel.model_ranks


@lru_cache(maxsize=1)
def _groups() -> frozenset[str]:
    from dist_llm.cli.compose import list_presets

    return frozenset(list_presets())


@lru_cache(maxsize=256)
def _base(choices: tuple[tuple[str, str], ...], file: Path | None = None) -> Tree:
    """Return what Hydra composes of presets, or a config file with them on top; not to be changed."""
    from dist_llm.cli.compose import compose

    return compose([f"{group}={name}" for group, name in choices], file)


def _plain(value: object) -> object:
    """Return a value as a config has it, where JSON has written a whole number as 2.0 or a number or switch as text."""
    if isinstance(value, str) and _LITERAL.fullmatch(value):
        value = json.loads(value.lower())
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


@lru_cache(maxsize=8)
def _family(name: str) -> Tree:
    """Return the model section of a family's preset; not to be changed."""
    options: Tree = _base((("model", _FAMILIES[name]),))["model"]
    return options


def _assign(tree: Tree, key: str, value: object) -> list[Violation]:
    """Set a dotted key of the tree; sections on the way are copied, for they are shared."""
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        inner = node.get(section, {})
        if not isinstance(inner, dict):
            return [Violation(key, shown(value), f"is inside {section}, which is no section")]
        node[section] = inner = dict(inner)
        node = inner
    if isinstance(value, dict) and isinstance(node.get(name), dict):
        value = {**node[name], **value}
    node[name] = copy.deepcopy(value)
    return []


def _sized_model(tree: Tree, settings: Mapping[str, object]) -> Tree:
    """Return the model of a row that gives sizes: a family's options, and what follows from the sizes."""
    family = settings.get("model.family", "gpt2")
    given = {key.removeprefix("model."): value for key, value in settings.items() if key.startswith("model.")}
    if not isinstance(family, str) or family not in _FAMILIES:
        model: Tree = tree["model"]
        return model
    model = {**_family(str(family)), "num_kv_heads": None, "vocab_size": _VOCAB}
    if (tree.get("parallel") or {}).get("context", 1) != 1:
        model |= {"dropout": 0.0, "attention_dropout": 0.0}
    hidden = given.get("hidden_size", model["hidden_size"])
    if isinstance(hidden, int) and hidden > 0:
        model["ffn_hidden_size"] = usual_ffn_width(family, hidden)
        model["num_heads"] = hidden // usual_head_width(hidden, 128)
    length = settings.get("data.seq_len", tree["data"]["seq_len"])
    model["max_seq_len"] = length if isinstance(length, int) else model["max_seq_len"]
    holder: Tree = {"model": model}
    for name, value in given.items():
        _assign(holder, f"model.{name}", value)
    sized: Tree = holder["model"]
    return sized


def _complete(tree: Tree, settings: Mapping[str, object], choices: Mapping[str, object]) -> None:
    """Fill in what a row leaves out beside the model: precision on CUDA, the schedule of several chunks."""
    cluster, parallel = tree.get("cluster"), tree.get("parallel")
    says_precision = "precision" in choices or "precision.name" in settings or "experiment" in choices
    if isinstance(cluster, dict) and cluster.get("device") == "cuda" and not says_precision:
        _assign(tree, "precision.name", "bf16")
    if isinstance(parallel, dict) and "parallel.schedule" not in settings and "parallel" not in choices:
        chunks, pipeline = parallel.get("virtual_pipeline", 1), parallel.get("pipeline", 1)
        if chunks != 1 and pipeline != 1:
            _assign(tree, "parallel.schedule", "interleaved")
    if isinstance(cluster, dict) and cluster.get("practice") == "megatron" and isinstance(parallel, dict):
        _complete_past(tree, settings, choices)
    if not {"data", "experiment"} & {*choices}:
        _complete_batch(tree, settings)


def _complete_batch(tree: Tree, settings: Mapping[str, object]) -> None:
    """Fill in the microbatch of a batch, or the batch that fills the pipeline of every data rank once."""
    if "data.global_batch" in settings:
        if "data.microbatch" not in settings:
            _assign(tree, "data.microbatch", 1)
        return
    config = decode_partly(tree).config
    data = ranks_of(config, settings) // config.parallel.model_ranks or 1
    _assign(tree, "data.global_batch", data * config.data.microbatch * config.parallel.pipeline)


def _complete_past(tree: Tree, settings: Mapping[str, object], choices: Mapping[str, object]) -> None:
    """Fill in whose software a row means where the cluster's figures are of 2021 to 2023."""
    if not {"engine", "experiment"} & {*choices} and "engine.name" not in settings:
        if not {"parallel.zero", "parallel"} & {*settings, *choices}:
            _assign(tree, "parallel.zero", 0)
        _assign(tree, "engine.name", _past_engine(tree["parallel"]))
    parallel, length = tree["parallel"], tree["data"].get("seq_len")
    short = isinstance(length, int) and length <= _LONGEST_SCORES and parallel.get("context", 1) == 1
    if short and parallel.get("zero") != 3 and "engine.transformer_engine" not in settings:
        _assign(tree, "engine.transformer_engine", "never")


def _past_engine(parallel: Mapping[str, Any]) -> str:
    """Return the engine that is nearest to what published runs of a layout had."""
    if parallel.get("zero") == 3 or parallel.get("schedule") in _OURS:
        return "native"
    alone = parallel.get("sequence") or parallel.get("virtual_pipeline", 1) != 1
    alone = alone or parallel.get("recompute") == "selective"
    return "deepspeed" if parallel.get("zero") in (1, 2) and not alone else "megatron"
