"""The tokenizer gives every text back unchanged, is the same file every time, and says which sizes are legal."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from dist_llm.config.inputs import TokenizerConfig
from dist_llm.data import tokenizer as tokenizer_module
from dist_llm.data.tokenizer import Tokenizer, cut_at_lines, train_tokenizer
from dist_llm.errors import ConfigError, DataError, StorageError
from tests.unit.data.corpora import VOCAB_SIZE, source_text

DOCUMENTS = [source_text(number) for number in range(6)]
NUM_BYTES = sum(len(text.encode()) for text in DOCUMENTS)


def train(path: Path, vocab_size: int = VOCAB_SIZE, **settings: object) -> Tokenizer:
    train_tokenizer(DOCUMENTS, path, vocab_size, TokenizerConfig.model_validate(settings), NUM_BYTES)
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(tmp_path_factory.mktemp("tokenizer") / "t.model")


TEXTS = [
    "",
    " ",
    "  a  ",
    "\t\tx\n\r\n\n  y",
    "▁",
    "▁▁a ▁ b▁",
    "\0a\0",
    "</s><unk><0x0A>",
    "\u2047 \u2047 ",
    "e\u0301 é 😀 日本",
    "\ufeff\x85\u2028\x7f",
]


@pytest.mark.parametrize("text", [*TEXTS, *DOCUMENTS[:2]], ids=range(len(TEXTS) + 2))
def test_every_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < VOCAB_SIZE for token in ids)
    assert tokenizer.eos_id not in ids


def test_random_characters_come_back_unchanged(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    legal = [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(300):
        alphabet = [chr(rng.choice(legal)) for _ in range(5)] + list(" \n\t▁a")
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_texts_are_encoded_in_parts_and_batches_agree_with_single_texts(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "_ENCODE_CHARACTERS", 50)
    monkeypatch.setattr(tokenizer_module, "_ENCODE_PARTS", 7)
    texts = ["", "▁", "x" * 160 + "▁\n▁", *DOCUMENTS]
    batch = [ids.tolist() for ids in tokenizer.encode_batch(texts, num_threads=2)]
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts


def test_cutting_loses_nothing_and_prefers_line_ends() -> None:
    text = "ab\ncdef\n" + "x" * 25 + "\ny"
    assert list(cut_at_lines(text, 10)) == ["ab\ncdef\n", "x" * 10, "x" * 10, "xxxxx\ny"]
    assert list(cut_at_lines("", 10)) == []
    assert list(cut_at_lines("a" * 10, 10)) == ["a" * 10]


def test_line_ends_and_indentation_are_learnt(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(":\n\treturn ")) < len(":\n\treturn ") / 2


def test_the_same_documents_give_the_same_file(tmp_path: Path) -> None:
    first, again = train(tmp_path / "a.model"), train(tmp_path / "b.model")
    assert first.sha256 == again.sha256
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a.model").read_bytes()


def test_training_on_a_share_hears_the_whole_corpus(tmp_path: Path) -> None:
    documents = [f"{word} = {word}\n" * 400 for word in ("alpha", "bravo", "gamma", "omega")]
    num_bytes = sum(map(len, documents))
    config = TokenizerConfig(train_mib=num_bytes / 2**20 / 4)
    train_tokenizer(documents, tmp_path / "t.model", 300, config, num_bytes)
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    assert all(len(tokenizer.encode(f"{word} =")) <= 3 for word in ("alpha", "bravo", "gamma", "omega"))


@pytest.mark.parametrize("vocab_size", [1, 100, 258, 270, 100_000])
def test_an_impossible_size_names_a_legal_one(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=f"model.vocab_size={vocab_size} ") as caught:
        train(tmp_path / "bad.model", vocab_size)
    assert caught.value.exit_code == 78
    assert not (tmp_path / "bad.model").exists()
    (violation,) = caught.value.violations
    (legal,) = violation.legal
    assert isinstance(legal, int)
    assert train(tmp_path / "good.model", legal).vocab_size == legal
    beyond = legal - 1 if vocab_size < legal else legal + 1
    with pytest.raises(ConfigError, match=re.escape(f"use {legal}")):
        train(tmp_path / "bad.model", beyond)


def test_without_byte_fallback_the_alphabet_is_the_corpus(tmp_path: Path) -> None:
    tokenizer = train(tmp_path / "t.model", 80, byte_fallback=False, character_coverage=1.0)
    assert tokenizer.vocab_size == 80
    assert tokenizer.decode(tokenizer.encode(DOCUMENTS[0])) == DOCUMENTS[0]


def test_an_existing_tokenizer_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(b"precious")
    with pytest.raises(StorageError, match="File exists"):
        train(tmp_path / "t.model")
    assert (tmp_path / "t.model").read_bytes() == b"precious"


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "t.model")
    whole = (tmp_path / "t.model").read_bytes()
    for content in (b"", b"garbage", whole[:100], whole[:-100]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.model is not a sentencepiece model"):
            Tokenizer.load(tmp_path / "bad.model")
    with pytest.raises(StorageError, match="No such file"):
        Tokenizer.load(tmp_path / "none.model")


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    for token in (-1, VOCAB_SIZE):
        with pytest.raises(DataError, match=f"token {token} is outside"):
            tokenizer.decode([5, token])
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eos_id]) == "a b"
