"""Python in an interpreter of its own: what a command answers, and which modules it has loaded by then."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from tests.contracts.source import ROOT

_RUN_MAIN = """
import contextlib, io, json, sys
bare = set(sys.modules)
from dist_llm.cli.main import main
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
    try:
        code = main(json.loads(sys.argv[1]))
    except SystemExit as stop:
        code = stop.code
print(json.dumps({"code": code or 0, "loaded": sorted(set(sys.modules) - bare), "text": text.getvalue()}))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, the modules that it loaded, and what it printed."""

    code: int
    loaded: list[str]
    text: str


def run_python(program: str, *arguments: object) -> str:
    """Run a program that reads its arguments as JSON; return what it prints."""
    words = [sys.executable, "-c", program, *(json.dumps(argument) for argument in arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(words: list[str]) -> Done:
    """Run `dist-llm` with these words."""
    return Done(**json.loads(run_python(_RUN_MAIN, words).splitlines()[-1]))
