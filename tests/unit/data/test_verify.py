"""`verify_dataset` reads everything: it finds what opening a data set cannot see, and nothing in a sound one."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from dist_llm.config.inputs import TokenizerConfig
from dist_llm.data import verify as verify_module
from dist_llm.data.indexed import IndexedWriter
from dist_llm.data.prepare import prepare
from dist_llm.data.verify import verify_dataset
from dist_llm.errors import DataError
from tests.unit.data.corpora import VOCAB_SIZE, data_config, no_report, write_folder


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    config = data_config(place, write_folder(place / "corpus", 2))
    return prepare(config, TokenizerConfig(), VOCAB_SIZE, no_report).prefix


def test_a_sound_data_set_has_no_problems(prefix: Path) -> None:
    report = verify_dataset(prefix, VOCAB_SIZE)
    assert report.ok
    assert report.problems == ()
    assert report.checksums_compared
    assert (report.num_documents, report.empty_documents, report.dtype) == (2, 0, "uint16")
    assert report.min_token == 1
    assert report.max_token is not None
    assert report.max_token < VOCAB_SIZE


def test_every_flipped_bit_is_found(prefix: Path) -> None:
    rng = random.Random(0)
    for name in ("tokens.bin", "tokens.idx", "tokenizer.model"):
        path = prefix.parent / name
        whole = path.read_bytes()
        try:
            for _ in range(200):
                content = bytearray(whole)
                content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
                path.write_bytes(content)
                try:
                    problems = verify_dataset(prefix, VOCAB_SIZE).problems
                except DataError as error:
                    problems = (str(error),)
                assert any(name in problem for problem in problems)
        finally:
            path.write_bytes(whole)
    assert verify_dataset(prefix, VOCAB_SIZE).ok


def test_another_vocabulary_is_found(prefix: Path) -> None:
    assert verify_dataset(prefix, VOCAB_SIZE + 1).problems == (
        "model.vocab_size=321, but the tokens were made with 320 pieces",
    )


def test_ids_outside_the_vocabulary_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_BLOCK_TOKENS", 10)
    with IndexedWriter(tmp_path / "data", 70_000) as writer:
        for document in (np.full(13, 5), [], np.full(14, 6), [7, 8, 66_000, 66_001]):
            writer.add(document)
    report = verify_dataset(tmp_path / "data", 66_000)
    (problem,) = report.problems
    assert "holds token 66000 at position 29, in document 3, outside model.vocab_size=66000" in problem
    assert (report.ok, report.checksums_compared) == (False, False)
    assert (report.min_token, report.max_token, report.empty_documents, report.longest_document) == (5, 66_001, 1, 14)
    assert verify_dataset(tmp_path / "data", 66_002).ok
    tokens = np.fromfile(tmp_path / "data.bin", "<i4")
    tokens[3] = -9
    tokens.tofile(tmp_path / "data.bin")
    assert "token -9 at position 3, in document 0" in verify_dataset(tmp_path / "data", 70_000).problems[0]


def test_a_data_set_without_tokens_is_found(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", 10):
        pass
    report = verify_dataset(tmp_path / "data", 10)
    assert "holds no tokens" in report.problems[0]
    assert (report.min_token, report.max_token, report.num_documents) == (None, None, 0)
