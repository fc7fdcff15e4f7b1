"""Build the documentation: check every link, run every Python block that a page shows, write docs/_build/*.html.

Pages are Markdown with plain GitHub rules; what is shown runs, so a page cannot drift from the code.
`make docs` builds; tests/contracts/test_docs.py calls the same checks, and the shown commands with them.
"""

from __future__ import annotations

import html
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs" / "_build"
_FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }}
code, pre {{ font: 14px/1.5 ui-monospace, monospace; background: #f4f5f7; border-radius: 4px; }}
code {{ padding: .1em .3em; }} pre {{ padding: .8rem 1rem; overflow-x: auto; }} pre code {{ padding: 0; }}
table {{ border-collapse: collapse; }} td, th {{ border: 1px solid #d5d9de; padding: .3rem .6rem; text-align: left; }}
a {{ color: #0b5cad; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language word, the line on which its text starts, and the text."""

    language: str
    line: int
    text: str


def pages() -> list[Path]:
    """List the Markdown pages of the repository: those at the top, under docs/, and one README a folder."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    return sorted({page for page in found if OUTPUT not in page.parents})


def fenced_blocks(text: str) -> list[Block]:
    """Cut the fenced blocks out of a page."""
    return [Block(match[2], text.count("\n", 0, match.start(3)) + 1, match[3]) for match in _FENCE.finditer(text)]


def broken_links(page: Path, text: str) -> list[str]:
    """Find relative links of the page that lead to no file; text inside fenced blocks is not looked at."""
    targets = [match[1] or match[2] for match in _LINK.finditer(_FENCE.sub("", text))]
    local = [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("mailto:")]
    return [f"{page.name}: no file {target}" for target in local if target and not (page.parent / target).exists()]


def shown_commands(text: str) -> list[list[str]]:
    """Collect the `dist-llm` and `make` command lines of a page's sh blocks, split into words, comments stripped."""
    lines = [line for block in fenced_blocks(text) if block.language == "sh" for line in _logical_lines(block.text)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] in {"dist-llm", "make"}]


def _logical_lines(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\\\n", " ").splitlines()]


def failing_code(page: Path, text: str) -> list[str]:
    """Run each Python block of the page in an interpreter of its own, from the repository; return what failed."""
    failures = []
    for block in fenced_blocks(text):
        if block.language != "python":
            continue
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block.text], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            failures.append(f"{page.name}:{block.line}: {done.stderr.strip().splitlines()[-1]}")
    return failures


def render(page: Path, text: str) -> str:
    """Turn a page into one HTML document whose links lead to the other rendered pages."""
    import markdown

    body = markdown.markdown(text, extensions=["tables", "fenced_code", "toc"])
    body = re.sub(r'href="(?!\w+:)([^"#]+)\.md', lambda match: f'href="{_flat(page.parent / (match[1] + ".md"))}', body)
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), page.stem)
    return _PAGE.format(title=html.escape(title), body=body)


def _flat(page: Path) -> str:
    """Name the HTML file of a page: its path from the repository with dashes for slashes."""
    relative = page.resolve().relative_to(ROOT).with_suffix("")
    return "index.html" if str(relative) == "README" else "-".join(relative.parts) + ".html"


def main() -> int:
    """Check and write every page; return 1 if a link or shown code is broken."""
    OUTPUT.mkdir(exist_ok=True)
    problems = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        problems += broken_links(page, text) + failing_code(page, text)
        (OUTPUT / _flat(page)).write_text(render(page, text), encoding="utf-8")
    for problem in problems:
        print(f"docs: {problem}", file=sys.stderr)
    print(f"docs: {len(pages())} pages in docs/_build, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
