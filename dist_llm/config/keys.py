"""The names of all settings, read off the sections: which exist, what they hold, which one a slip meant."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Annotated, get_args, get_origin

from pydantic.fields import FieldInfo

from dist_llm.config.base import Section
from dist_llm.config.run import RunConfig

_OTHER_NAMES = {
    "tp": "parallel.tensor",
    "pp": "parallel.pipeline",
    "vpp": "parallel.virtual_pipeline",
    "dp": "parallel.data",
    "cp": "parallel.context",
    "ep": "parallel.expert",
    "sp": "parallel.sequence",
    "zero_stage": "parallel.zero",
    "batch_size": "data.global_batch",
    "global_batch_size": "data.global_batch",
    "micro_batch_size": "data.microbatch",
    "learning_rate": "optimizer.lr",
    "grad_clip": "optimizer.clip_norm",
    "max_steps": "run.steps",
    "num_gpus": "launcher.nproc",
    "nproc_per_node": "launcher.nproc",
    "intermediate_size": "model.ffn_hidden_size",
    "dtype": "precision.name",
    "base_hidden_size": "model.mup.base_width",
    "mup_base_hidden_size": "model.mup.base_width",
    "mup_base_head_dim": "model.mup.base_head_width",
    "mup_output_mult": "model.mup.output_multiplier",
    "mup_embedding_mult": "model.mup.embedding_multiplier",
}
"""What other frameworks call a setting."""


def nested_section(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, None for a plain value."""
    held = field.annotation
    return held if isinstance(held, type) and issubclass(held, Section) else None


@cache
def all_fields(kind: type[Section] = RunConfig) -> dict[str, FieldInfo]:
    """Return every field by its key path, sections too."""
    return dict(_fields_of(kind, ""))


def _fields_of(cls: type[Section], prefix: str) -> list[tuple[str, FieldInfo]]:
    """List the fields of a section and of the sections in it."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in cls.model_fields.items():
        found.append((prefix + name, field))
        section = nested_section(field)
        if section is not None:
            found.extend(_fields_of(section, f"{prefix}{name}."))
    return found


def field_at(key: str, kind: type[Section] = RunConfig) -> FieldInfo | None:
    """Return the field at a key path, None where there is none."""
    return all_fields(kind).get(key)


def takes_text(key: str) -> bool:
    """Whether the setting at `key` holds free text: what a user writes there is the value, not a number or a list."""
    field = field_at(key)
    if field is None:
        return False
    held = [part for part in get_args(field.annotation) or (field.annotation,) if part is not type(None)]
    return [get_args(part)[0] if get_origin(part) is Annotated else part for part in held] == [str]


def closest_key(key: str, kind: type[Section] = RunConfig) -> str | None:
    """Return the setting that an unknown `key` most likely meant: by another name, a sibling, the same elsewhere.

    A key without a section may also mean a group, such as `model` or `experiment`.
    """
    section, _, last = key.rpartition(".")
    known = all_fields(kind)
    if _OTHER_NAMES.get(last) in known:
        return _OTHER_NAMES[last]
    fields = [name for name, field in known.items() if nested_section(field) is None]
    siblings = {name.rpartition(".")[2]: name for name in fields if name.rpartition(".")[0] == section}
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(fields)}
    if last in elsewhere:
        return elsewhere[last]
    groups = {} if section else {name: name for name in (*kind.model_fields, "experiment")}
    for named in (siblings, {**elsewhere, **groups}):
        near = difflib.get_close_matches(last, named, n=1, cutoff=0.6)
        if near:
            return named[near[0]]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return near[0] if near else None
