"""From `data.path` to tokens that a run can read: once, under a lock, cached apart from the run.

    corpus -> tokenizer (trained, or tokenizer.path) -> indexed tokens -> manifest -> <data.cache_dir>/<name>-<key>

The key covers the files' names, sizes and modification times and every setting that the result depends on.
Invariant: any number of processes may call `prepare` at once; one prepares, the others wait, all get the same folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_llm.config.inputs import DataConfig, TokenizerConfig
from dist_llm.data.cache import Report, build_once
from dist_llm.data.corpus import MIB, STDLIB, Corpus, find_corpus, read_documents
from dist_llm.data.files import display, file_sha256, open_regular, storage_errors, user_path, write_synced
from dist_llm.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path
from dist_llm.data.prepared import (
    MANIFEST,
    PREFIX,
    TOKENIZER,
    FileFacts,
    Manifest,
    PreparedData,
    open_prepared,
    require_vocab,
    sampled_fingerprint,
    write_manifest,
)
from dist_llm.data.tokenizer import MAX_MODEL_BYTES, Tokenizer, train_tokenizer, usable_cores
from dist_llm.errors import ConfigError, DataError, Violation

_RECIPE = 2
"""Part of the cache key: to be raised whenever the same input would give other tokens."""
_BATCH_CHARACTERS = 1 << 20
_REPORT_SECONDS = 2.0
_NO_FILES = "no files; links, hidden names and folders of runs are passed over"


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, vocab_size: int, report: Report, waiting: Report | None = None
) -> PreparedData:
    """Return the tokens behind data.path, preparing them where the cache lacks them; says what it does to `report`.

    That another process prepares them is said to `waiting`, or to `report` as well.

    Raises DataError (no text, undecodable or damaged), StorageError (missing, unreadable, unwritable) and ConfigError
    (a vocabulary that the corpus or the tokenizer does not have), each naming the setting or the file.
    """
    prefix = _find_prefix(data.path)
    if prefix is not None:
        return _use_prefix(prefix, tokenizer, vocab_size)
    recipe = _Recipe(find_corpus(data.path), data, tokenizer, vocab_size)
    folder = _cache_folder(recipe)
    build_once(folder, lambda private: _build(private, recipe, report), waiting or report)
    return open_prepared(folder, vocab_size)


def prepare_tokenizer(
    data: DataConfig, tokenizer: TokenizerConfig, vocab_size: int, output: Path, report: Report
) -> Tokenizer:
    """Train a tokenizer on the text of data.path and write it to `output`, a new file. Raises as `prepare` does."""
    recipe = _Recipe(find_corpus(data.path), data, tokenizer, vocab_size)
    _train(output, recipe, _survey(recipe, report), report)
    return Tokenizer.load(output)


@dataclass(frozen=True)
class _Recipe:
    """All that the prepared tokens depend on."""

    corpus: Corpus
    data: DataConfig
    tokenizer: TokenizerConfig
    vocab_size: int

    def name(self) -> str:
        """Return the cache folder's name: the corpus in words and a key over everything."""
        given = self.tokenizer.path
        if given is None:
            pieces: object = self.tokenizer.model_dump(mode="json", exclude={"path"})
        else:
            path = user_path("tokenizer.path", given)
            require_vocab(self.vocab_size, Tokenizer.load(path).vocab_size, path)
            pieces = file_sha256(path)
        facts = [_RECIPE, self.corpus.signature(), self.data.max_corpus_mib, self.vocab_size, pieces]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
        words = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.corpus.location).name)[:40].strip("-") or "corpus"
        return f"{words}-{key}"

    def documents(self) -> Iterator[str]:
        """Yield the documents within data.max_corpus_mib."""
        return read_documents(self.corpus, self.data.max_corpus_mib)


@dataclass(frozen=True)
class _Survey:
    """What one pass over the corpus found; num_bytes of UTF-8 text."""

    num_documents: int
    num_bytes: int
    skipped_files: int


class _Progress:
    """Reports how far a pass over the corpus is, every few seconds."""

    def __init__(self, what: str, total_bytes: int, report: Report) -> None:
        self._what, self._total, self._report = what, max(1, total_bytes), report
        self._reported = time.monotonic()

    def at(self, num_bytes: int) -> None:
        """Say that num_bytes of the text are done, if it is time to say something."""
        now = time.monotonic()
        if now - self._reported >= _REPORT_SECONDS:
            share = min(1.0, num_bytes / self._total)
            self._report(f"{self._what}: {num_bytes / MIB:.1f} of {self._total / MIB:.1f} MiB ({share:.0%})")
            self._reported = now


def _cache_folder(recipe: _Recipe) -> Path:
    """Return where the recipe's result is cached. Raises ConfigError where that would become part of the corpus."""
    cache = user_path("data.cache_dir", recipe.data.cache_dir)
    corpus = Path(recipe.corpus.location)
    if not recipe.corpus.explicit and cache.is_relative_to(corpus):
        inside = cache.relative_to(corpus).parts
        if not any(part.startswith(".") for part in inside):
            rule = f"must not lie in data.path={display(corpus)}, or what is prepared would be read as text"
            raise ConfigError([Violation("data.cache_dir", recipe.data.cache_dir, rule, ("~/.cache/dist_llm",))])
    return cache / recipe.name()


def _find_prefix(path: str) -> Path | None:
    """Return the prefix of the indexed tokens that data.path names: a prefix, one of the pair, a prepared folder."""
    if path == STDLIB:
        return None
    place = user_path("data.path", path)
    with storage_errors("find data.path", path):
        if place.suffix in {".bin", ".idx"}:
            named = place.with_suffix("")
            if bin_path(named).exists() and idx_path(named).exists():
                return named
        if idx_path(place).is_file() or (bin_path(place).is_file() and not place.exists()):
            return place
        if (place / MANIFEST).is_file() and idx_path(place / PREFIX).is_file():
            return place / PREFIX
    return None


def _use_prefix(prefix: Path, tokenizer: TokenizerConfig, vocab_size: int) -> PreparedData:
    given = None if tokenizer.path is None else user_path("tokenizer.path", tokenizer.path)
    if prefix.name == PREFIX and (prefix.parent / MANIFEST).is_file():
        prepared = open_prepared(prefix.parent, vocab_size)
        if given is not None and file_sha256(given) != prepared.tokenizer_sha256:
            rule = f"must be the tokenizer that made data.path, {display(prepared.tokenizer_path)}"
            raise ConfigError([Violation("tokenizer.path", display(given), rule)])
        return prepared
    dataset = IndexedDataset(prefix)
    if given is None:
        rule = f"must name the sentencepiece .model file that made the tokens of data.path={display(prefix)}"
        raise ConfigError([Violation("tokenizer.path", None, rule)])
    model = Tokenizer.load(given)
    require_vocab(vocab_size, model.vocab_size, given)
    return PreparedData(
        prefix=prefix,
        tokenizer_path=given,
        num_tokens=dataset.num_tokens,
        num_documents=dataset.num_documents,
        fingerprint=sampled_fingerprint(prefix),
        tokenizer_sha256=model.sha256,
    )


def _build(folder: Path, recipe: _Recipe, report: Report) -> None:
    started = time.monotonic()
    survey = _survey(recipe, report)
    if recipe.tokenizer.path is None:
        _train(folder / TOKENIZER, recipe, survey, report)
    else:
        with open_regular(user_path("tokenizer.path", recipe.tokenizer.path)) as file:
            write_synced(folder / TOKENIZER, file.read(MAX_MODEL_BYTES))
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    with IndexedWriter(folder / PREFIX, recipe.vocab_size) as writer:
        _encode(recipe, survey, tokenizer, writer, report)
    if find_corpus(recipe.data.path).signature() != recipe.corpus.signature():
        raise DataError(f"data.path={recipe.data.path} was changed while it was being read; start again")
    checksums = {
        bin_path(Path(PREFIX)).name: writer.bin_sha256,
        idx_path(Path(PREFIX)).name: writer.idx_sha256,
        TOKENIZER: tokenizer.sha256,
    }
    manifest = Manifest(
        source=display(recipe.corpus.location),
        vocab_size=recipe.vocab_size,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_text_bytes=survey.num_bytes,
        skipped_files=survey.skipped_files,
        files={name: FileFacts(num_bytes=(folder / name).stat().st_size, sha256=checksums[name]) for name in checksums},
    )
    write_manifest(folder, manifest)
    seconds = time.monotonic() - started
    report(f"prepared {writer.num_tokens:,} tokens in {writer.num_documents:,} documents in {seconds:.1f} s")


def _survey(recipe: _Recipe, report: Report) -> _Survey:
    """Read the corpus once, so that what is wrong with it is found before any work is done."""
    corpus, limit = recipe.corpus, recipe.data.max_corpus_mib
    report(f"reading data.path={recipe.data.path}: {len(corpus.files)} files, {corpus.num_bytes / MIB:.1f} MiB")
    progress = _Progress("reading", corpus.num_bytes, report)
    skipped: list[tuple[str, str]] = []
    num_documents = num_bytes = 0
    for text in read_documents(corpus, limit, lambda name, reason: skipped.append((name, reason))):
        num_documents += 1
        num_bytes += len(text.encode())
        progress.at(num_bytes)
    if skipped:
        name, reason = skipped[0]
        report(
            f"passed over {len(skipped)} files that hold no text to learn from (the first: {display(name)}, {reason})"
        )
    if not num_documents:
        held = f"{len(corpus.files)} files, {len(skipped)} of them without text to learn from, the others empty"
        raise DataError(f"data.path={recipe.data.path} holds no text ({held if corpus.files else _NO_FILES})")
    return _Survey(num_documents, num_bytes, len(skipped))


def _train(path: Path, recipe: _Recipe, survey: _Survey, report: Report) -> None:
    num_mib = min(recipe.tokenizer.train_mib, survey.num_bytes / MIB)
    total = f"{survey.num_bytes / MIB:.1f} MiB in {survey.num_documents} documents"
    report(f"training a tokenizer of {recipe.vocab_size} pieces on {num_mib:.1f} of {total}")
    train_tokenizer(recipe.documents(), path, recipe.vocab_size, recipe.tokenizer, survey.num_bytes)


def _encode(recipe: _Recipe, survey: _Survey, tokenizer: Tokenizer, writer: IndexedWriter, report: Report) -> None:
    report(f"encoding {survey.num_bytes / MIB:.1f} MiB")
    progress = _Progress("encoding", survey.num_bytes, report)
    num_threads, num_bytes = usable_cores(), 0
    for texts in _batches(recipe.documents()):
        for ids in tokenizer.encode_batch(texts, num_threads):
            writer.add(np.append(ids, tokenizer.eos_id))
        num_bytes += sum(len(text.encode()) for text in texts)
        progress.at(num_bytes)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Group documents so that a group keeps every core busy and little memory."""
    group: list[str] = []
    num_characters = 0
    for document in documents:
        group.append(document)
        num_characters += len(document)
        if num_characters >= _BATCH_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group
