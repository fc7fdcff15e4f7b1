"""Size is a promise to the reader: files of 400 lines, functions of 60, 7 arguments; a docstring, a telling name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath

from tests.contracts.source import Source, functions

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 7
MAX_MODULE_DOCSTRING_LINES = 10
VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "manager", "managers", "handler", "handlers"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_files(path: str, text: str) -> Iterator[str]:
    """Find a file longer than MAX_FILE_LINES."""
    count = len(text.splitlines())
    if count > MAX_FILE_LINES:
        yield f"{path}:1: {count} lines; at most {MAX_FILE_LINES}"


def long_functions(source: Source) -> Iterator[str]:
    """Find functions longer than MAX_FUNCTION_LINES, from `def` to the last line."""
    for node in functions(source.tree):
        count = (node.end_lineno or node.lineno) - node.lineno + 1
        if count > MAX_FUNCTION_LINES:
            yield source.at(node, f"{node.name} has {count} lines; at most {MAX_FUNCTION_LINES}")


def many_arguments(source: Source) -> Iterator[str]:
    """Find functions with more than MAX_ARGUMENTS arguments; self and cls are not counted, *args is one."""
    for node in functions(source.tree):
        spec = node.args
        names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)]
        if names and names[0] in {"self", "cls"}:
            names = names[1:]
        count = len(names) + len(spec.kwonlyargs) + (spec.vararg is not None) + (spec.kwarg is not None)
        if count > MAX_ARGUMENTS:
            yield source.at(node, f"{node.name} has {count} arguments; at most {MAX_ARGUMENTS}")


def vague_names(source: Source) -> Iterator[str]:
    """Find modules and packages whose name says only that code is inside."""
    for part in PurePosixPath(source.path).with_suffix("").parts:
        if VAGUE_NAMES & set(part.lower().split("_")):
            yield f"{source.path}:1: {part} names no thing; name what is inside"


def missing_docstrings(source: Source) -> Iterator[str]:
    """Find modules, public classes and public functions without a docstring, and module docstrings that ramble."""
    text = ast.get_docstring(source.tree)
    if not text:
        yield f"{source.path}:1: module has no docstring"
    elif len(text.splitlines()) > MAX_MODULE_DOCSTRING_LINES:
        count = len(text.splitlines())
        yield f"{source.path}:1: module docstring has {count} lines; at most {MAX_MODULE_DOCSTRING_LINES}"
    yield from _undocumented(source, source.tree)


def _undocumented(source: Source, parent: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_") or _exempt(node):
            continue
        if not ast.get_docstring(node):
            yield source.at(node, f"{node.name} has no docstring")
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(source, node)


def _exempt(node: ast.ClassDef | Function) -> bool:
    """Say whether another definition carries the docstring: an overload, an override, a property's setter."""
    marks = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return bool(marks & {"overload", "override", "setter", "deleter"})
