"""What is written about settings: each has a description, in the schema and on the page, and says what it takes."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from dist_llm.config.base import Section
from dist_llm.config.keys import all_fields, nested_section
from dist_llm.config.reference import field_descriptions, json_schema, list_settings, sections, settings_page

LEAVES = [key for key, field in all_fields().items() if nested_section(field) is None]
SCHEMA: dict[str, Any] = json_schema()


def _property(key: str) -> dict[str, Any]:
    """Return the schema's property at a key, following references through the sections."""
    *path, name = key.split(".")
    node = SCHEMA
    for section in path:
        node = SCHEMA["$defs"][node["properties"][section]["$ref"].rpartition("/")[2]]
    found: dict[str, Any] = node["properties"][name]
    return found


def test_every_field_is_described() -> None:
    missing = [key for key in all_fields() if not str(_property(key).get("description", "")).endswith(".")]
    assert not missing, f"give these a line under the field that ends with a full stop: {missing}"


def test_the_page_has_every_setting() -> None:
    page = settings_page()
    for key in LEAVES:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key}` | ")]
        assert row.endswith(f" | {_property(key)['description']} |")
        assert row.count(" | ") == 3
    assert page.endswith(f"{len(LEAVES)} settings.\n")
    assert all(f"\n## {key}\n" in page for key in sections() if key)


def test_the_line_under_a_field_wins() -> None:
    assert _property("run.dir")["description"] == "Folder that holds the folders of runs."
    assert _property("tokenizer.path")["description"].startswith("sentencepiece `.model` file")
    # What the type says of itself stays where errors read it.
    assert (all_fields()["run.dir"].description or "").startswith("a path: ")


def test_sections_are_described_beside_their_reference() -> None:
    assert _property("model.rope").keys() == {"$ref", "default", "description"}
    assert _property("cluster.peak_tflops").keys() == {"$ref", "description"}


@pytest.mark.parametrize(
    ("key", "takes", "default"),
    [
        ("device", "auto, cpu or cuda", "auto"),
        ("run.name", "folder name", "default"),
        ("run.seed", "whole number from 0, below 2^63", "0"),
        ("run.deterministic", "true or false", "true"),
        ("model.family", "gpt2 or llama", "required"),
        ("model.rope.attention_factor", "number above 0, or null", "null"),
        ("parallel.bucket_mib", "whole number from 1 to 65536", "64"),
        ("optimizer.name", "only adamw", "adamw"),
        ("optimizer.betas", "list of 2, each a number from 0, below 1", "[0.9, 0.95]"),
        ("optimizer.eps", "number above 0", "1e-08"),
        ("data.max_corpus_mib", "number above 0, at most 2^30, or null", "null"),
        ("tokenizer.path", "path, or null", "null"),
        ("telemetry.sample_prompt", "text, at most 65536 characters", '""'),
        ("cluster.source", "text", "required"),
    ],
)
def test_what_a_setting_takes(key: str, takes: str, default: str) -> None:
    (setting,) = [setting for setting in list_settings(key) if setting.key == key]
    assert (setting.takes, setting.spelled_default) == (takes, default)


class _Sample(Section):
    """A section with and without lines."""

    first: int = 1
    """The first
    of them."""
    second: Literal["a"] = "a"
    third: float = 0.5
    """The third."""

    @property
    def fourth(self) -> int:
        """Not a field."""
        return 4


def test_lines_are_read_from_under_their_field() -> None:
    assert field_descriptions(_Sample) == {"first": "The first of them.", "third": "The third."}
