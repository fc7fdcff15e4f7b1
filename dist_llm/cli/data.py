"""`dist-llm data`: make, look at and check what a run reads."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dist_llm.cli.parse import Answer, Command, add_config, add_json, compose_arguments, load_config
from dist_llm.errors import ConfigError, ExitCode, Violation

if TYPE_CHECKING:
    from dist_llm.config.run import RunConfig
    from dist_llm.data.prepared import PreparedData
    from dist_llm.data.verify import DatasetReport

MOST_TOKENS = 64


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config."""
    add_config(parser)
    add_json(parser)


def prepare(arguments: argparse.Namespace) -> Answer:
    """Make tokenizer and indexed tokens of the configured corpus, unless they are there."""
    prepared = _prepared(load_config(compose_arguments(arguments), None), arguments)
    return _answer(_facts(prepared))


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config, a file to write and a text to encode."""
    add_config(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="train it anew on data.path and write it there")
    parser.add_argument("--text", metavar="TEXT", help="encode this, and show its pieces")
    add_json(parser)


def tokenizer(arguments: argparse.Namespace) -> Answer:
    """Train the tokenizer of a config, or describe the one that its data has; encode a text with it."""
    config = load_config(compose_arguments(arguments), None)
    from dist_llm.data.prepare import prepare_tokenizer
    from dist_llm.data.tokenizer import Tokenizer

    if arguments.output is not None:
        path = arguments.output
        model = prepare_tokenizer(config.data, config.tokenizer, config.model.vocab_size, path, _reporter(arguments))
    else:
        path = _prepared(config, arguments).tokenizer_path
        model = Tokenizer.load(path)
    facts: dict[str, object] = {
        "path": str(path),
        "vocab_size": model.vocab_size,
        "eos_id": model.eos_id,
        "sha256": model.sha256,
    }
    if arguments.text is not None:
        ids = model.encode(arguments.text)
        facts["tokens"] = ids
        facts["pieces"] = [model.decode([token]) for token in ids]
        facts["bytes_per_token"] = len(arguments.text.encode("utf-8", "surrogateescape")) / len(ids) if ids else None
    return _answer(facts)


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config or a prefix, and a document."""
    _add_data_set(parser)
    parser.add_argument("--document", type=int, default=0, metavar="N", help="show the start of document N (default 0)")
    add_json(parser)


def inspect(arguments: argparse.Namespace) -> Answer:
    """Describe a data set and show the start of a document."""
    prefix, tokenizer_path, _ = _data_set(arguments)
    from dist_llm.data.indexed import IndexedDataset
    from dist_llm.data.tokenizer import Tokenizer

    dataset = IndexedDataset(prefix)
    if dataset.num_documents and not 0 <= arguments.document < dataset.num_documents:
        legal = (0, dataset.num_documents - 1)
        raise ConfigError([Violation("--document", arguments.document, f"must be from {legal[0]} to {legal[1]}")])
    tokens = dataset.document(arguments.document)[:MOST_TOKENS].tolist() if dataset.num_documents else []
    facts: dict[str, object] = {
        "prefix": str(prefix),
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "dtype": str(dataset.dtype),
        "document": arguments.document,
        "first_tokens": tokens,
    }
    if tokenizer_path is not None:
        facts["text"] = Tokenizer.load(tokenizer_path).decode(tokens)
    return _answer(facts)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a config or a prefix."""
    _add_data_set(parser)
    parser.add_argument("--vocab-size", type=int, metavar="N", help="with --prefix: no token may be N or above")
    add_json(parser)


def verify(arguments: argparse.Namespace) -> Answer:
    """Read a whole data set and check every token."""
    if arguments.prefix is not None and (arguments.vocab_size is None or arguments.vocab_size < 1):
        words = "must be given with --prefix, and be at least 1"
        raise ConfigError([Violation("--vocab-size", arguments.vocab_size, words)])
    prefix, _, vocab_size = _data_set(arguments)
    from dist_llm.data.verify import verify_dataset

    found = verify_dataset(prefix, arguments.vocab_size or vocab_size)
    return _answer(_facts(found), ExitCode.DONE if found.ok else ExitCode.BAD_DATA)


def _add_data_set(parser: argparse.ArgumentParser) -> None:
    """Take a config or, in its place, a prefix."""
    add_config(parser)
    parser.add_argument("--prefix", type=Path, metavar="PREFIX", help="a data set, without .bin and .idx")


def _data_set(arguments: argparse.Namespace) -> tuple[Path, Path | None, int]:
    """Return the prefix of a data set, its tokenizer if known, and the vocabulary it must stay in (0: unknown)."""
    if arguments.prefix is not None:
        if arguments.overrides or arguments.config_file is not None:
            raise ConfigError("--prefix names a data set: give it or a config, not both")
        return arguments.prefix, None, 0
    config = load_config(compose_arguments(arguments), None)
    prepared = _prepared(config, arguments)
    return prepared.prefix, prepared.tokenizer_path, config.model.vocab_size


def _prepared(config: RunConfig, arguments: argparse.Namespace) -> PreparedData:
    """Return the prepared data of a config, making it if need be."""
    from dist_llm.data.prepare import prepare as prepare_data

    return prepare_data(config.data, config.tokenizer, config.model.vocab_size, _reporter(arguments))


def _reporter(arguments: argparse.Namespace) -> Callable[[str], None]:
    """Return what prints progress on stderr."""
    from dist_llm.runtime.log import configure_logging, get_logger

    configure_logging(0, arguments.debug)
    return get_logger("cli.data").info


def _facts(found: PreparedData | DatasetReport) -> dict[str, object]:
    """Return what was found as plain values."""
    facts = dataclasses.asdict(found)
    return {name: str(value) if isinstance(value, Path) else value for name, value in facts.items()}


def _answer(facts: Mapping[str, object], code: int = ExitCode.DONE) -> Answer:
    """Return facts: for a person a line each, and a line for each of several problems."""
    lines = [f"{name}: {value}" for name, value in facts.items() if name != "problems"]
    problems = facts.get("problems")
    lines += [f"problem: {problem}" for problem in problems] if isinstance(problems, list | tuple) else []
    return Answer("\n".join(lines), facts, code)


COMMANDS = {
    "prepare": Command("make tokenizer and indexed tokens of the corpus", add_prepare_arguments, prepare),
    "tokenizer": Command("train or describe the tokenizer, encode a text", add_tokenizer_arguments, tokenizer),
    "inspect": Command("describe a data set and show a document", add_inspect_arguments, inspect),
    "verify": Command("read a whole data set and check every token", add_verify_arguments, verify),
}
