"""What the documentation shows is so: links lead somewhere, Python blocks run, commands and targets are understood."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.build import ROOT, broken_links, failing_code, fenced_blocks, pages, render, shown_commands

_HARMLESS = {"train": "--cfg", "launch": "--dry-run"}
"""What makes a command parse its whole config and do nothing else; other commands are asked for --help."""
_RUN_EACH = """
import contextlib, io, json, sys
from dist_llm.cli.main import main
for words in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    if code:
        print(json.dumps([" ".join(words), code, text.getvalue()]))
"""


def refused_commands(commands: list[list[str]]) -> list[str]:
    """Parse `dist-llm` command lines, running nothing; return those that are refused."""
    lines = [_harmless(words[1:]) for words in commands]
    program = [sys.executable, "-c", _RUN_EACH, json.dumps(lines)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _harmless(words: list[str]) -> list[str]:
    ask = _HARMLESS.get(words[0], "--help")
    return words if ask in words else [*words, ask]


def unknown_targets(commands: list[list[str]], makefile: str) -> list[str]:
    """Name the make targets that the Makefile does not have."""
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    targets = [word for words in commands for word in words[1:] if "=" not in word]
    return [target for target in targets if target not in known]


def _shown(tool: str) -> list[list[str]]:
    commands = [words for page in pages() for words in shown_commands(page.read_text(encoding="utf-8"))]
    return [words for words in commands if words[0] == tool]


def test_shown_commands_parse() -> None:
    commands = _shown("dist-llm")
    assert len(commands) >= 3
    refused = refused_commands(commands)
    assert not refused, "\n".join(refused)


def test_shown_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    mentioned = [["make", match] for page in pages() for match in re.findall(r"`make ([a-z]+)", page.read_text())]
    assert len(mentioned) > 5
    assert unknown_targets(_shown("make") + mentioned, makefile) == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_page_is_sound(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    problems = broken_links(page, text) + failing_code(page, text)
    assert not problems, "\n".join(problems)
    assert "</html>" in render(page, text)


def test_refused_commands_is_seen() -> None:
    bad = [
        ["dist-llm", "train", "optimizer.lrr=1"],
        ["dist-llm", "trian"],
        ["dist-llm", "launch", "experiment=quickstart"],
    ]
    refused = refused_commands(bad)
    assert len(refused) == 2
    assert "optimizer.lrr" in refused[0]


def test_unknown_targets_is_seen() -> None:
    assert unknown_targets([["make", "setup", "A=b"], ["make", "nothing"]], "setup: x\n") == ["nothing"]


def test_broken_links_is_seen() -> None:
    page = ROOT / "README.md"
    assert broken_links(page, "[a](LICENSE) [b](nowhere.md#x)\n```\n[c](shown)\n```\n") == [
        "README.md: no file nowhere.md"
    ]


def test_failing_code_is_seen() -> None:
    text = "Text.\n\n```python\nimport dist_llm\nassert dist_llm.__version__ == ''\n```\n"
    assert failing_code(ROOT / "README.md", text) == ["README.md:4: AssertionError"]
    assert failing_code(ROOT / "README.md", text.replace("== ''", "!= ''")) == []


def test_shown_commands_are_found() -> None:
    text = "```sh\ndist-llm train a=1 \\\n    b=2  # why\nls\n```\n```\ndist-llm not shown as sh\n```\n"
    assert shown_commands(text) == [["dist-llm", "train", "a=1", "b=2"]]
    assert [block.language for block in fenced_blocks(text)] == ["sh", ""]
