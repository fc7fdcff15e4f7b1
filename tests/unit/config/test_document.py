"""Config files: what is written reads back equal; surprising and hostile YAML is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from dist_llm.config.decode import decode
from dist_llm.config.document import parse_document, read_document, render_document
from dist_llm.errors import ConfigError, StorageError
from tests.unit.config.trees import config_with
from tests.work import counted

TEXTS = [
    "no",
    "1e3",
    "07",
    "0x1F",
    "1_000",
    "null",
    "~",
    "true",
    "a: b",
    "- x",
    "é ü",
    "#",
    "*a",
    "a\tb",
    "'",
    '"',
    "1:30",
]


@pytest.mark.parametrize("text", [*TEXTS, "def f():\n    return 1\n", "\u2028", "2024-01-01", "=", "<<", ".inf", "yes"])
def test_text_survives(text: str) -> None:
    config = config_with(telemetry__sample_prompt=text)
    written = render_document(config)
    assert decode(parse_document(written, "test")) == config
    assert yaml.safe_load(written)["telemetry"]["sample_prompt"] == text


@pytest.mark.parametrize("number", [1e-8, 3e-4, 1e22, 0.1 + 0.2, 1.0, 5e-324, 1.7976931348623157e308])
def test_numbers_survive(number: float) -> None:
    config = config_with(optimizer__eps=number)
    written = render_document(config)
    assert decode(parse_document(written, "test")) == config
    assert yaml.safe_load(written)["optimizer"]["eps"] == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-2", -2),
        ("07", "07"),
        ("no", "no"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("True", "True"),
        ("", None),
        ("null", None),
        ("false", False),
    ],
)
def test_scalars_mean_what_they_say(text: str, value: object) -> None:
    assert parse_document(f"key: {text}", "test") == {"key": value}


_BOMB = "a: &a [x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  steps: 1\n  steps: 2\n", "f.yaml, line 3: duplicate key 'steps'"),
        ("run: {}\nrun: {}\n", "f.yaml, line 2: duplicate key 'run'"),
        (_BOMB, "f.yaml, line 1: anchors and aliases are not allowed"),
        ("run: *a\n", "f.yaml, line 1: anchors and aliases are not allowed"),
        ("run: !!python/object/apply:os.system [id]\n", "f.yaml, line 1: the tag tag:yaml.org,2002:python"),
        ("run: !x 1\n", "f.yaml, line 1: the tag !x is not allowed"),
        ("1: 2\n", "f.yaml, line 1: a key must be text"),
        ("? [a]\n: 1\n", "f.yaml, line 1: a key must be text"),
        ("- 1\n", "f.yaml: a config file must hold sections"),
        ("", "f.yaml: a config file must hold sections"),
        ("run: [1\n", "f.yaml, line 2: "),
        ("run: {}\n---\nrun: {}\n", "f.yaml, line 2: but found another document"),
        ("\trun: 1\n", "f.yaml, line 1: found character"),
        ("run: \0\n", "f.yaml: not a config file"),
        ("a: " + "[" * 3000, "f.yaml, line 1: nested deeper than 16"),
        ("a: " + "9" * 5000, "f.yaml: not a config file: Exceeds the limit"),
    ],
)
def test_bad_yaml_is_one_line(text: str, message: str) -> None:
    with counted() as work, pytest.raises(ConfigError) as caught:
        parse_document(text, "f.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert work.lines < 200_000 + 3 * len(text) ** 2  # a bracket may cost as many lines as are open


def test_merge_keys_are_plain_keys() -> None:
    tree = parse_document("base: {}\nrun:\n  <<: {steps: 1}\n", "f.yaml")
    assert tree["run"] == {"<<": {"steps": 1}}
    with pytest.raises(ConfigError, match=r"did you mean run\.steps"):
        decode(tree)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_document(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_document(tmp_path)
    with pytest.raises(StorageError, match="File name too long"):
        read_document(tmp_path / ("x" * 300))
    (tmp_path / "latin.yaml").write_bytes(b"run:\n  name: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 text at byte 13"):
        read_document(tmp_path / "latin.yaml")
    (tmp_path / "long.yaml").write_bytes(b"a: b\n" * 300000)
    with pytest.raises(ConfigError, match="must not exceed"):
        read_document(tmp_path / "long.yaml")


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"run: {steps: 3}\n")
    os.close(writer)
    assert read_document(Path(f"/dev/fd/{reader}")) == {"run": {"steps": 3}}
    os.close(reader)
