"""Preparing a corpus: what it gives, what it reuses, and how each bad input and setting is answered."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dist_llm.config.inputs import DataConfig, TokenizerConfig
from dist_llm.data.corpus import iter_documents
from dist_llm.data.indexed import IndexedDataset
from dist_llm.data.prepare import prepare, prepare_tokenizer
from dist_llm.data.prepared import PreparedData
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import ConfigError, DataError, DistLLMError, StorageError
from tests.unit.data.corpora import VOCAB_SIZE, data_config, no_report, write_folder
from tests.work import counted


def run(data: DataConfig, vocab_size: int = VOCAB_SIZE, **settings: object) -> PreparedData:
    return prepare(data, TokenizerConfig.model_validate(settings), vocab_size, no_report)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "corpus")


def test_the_tokens_are_the_corpus(tmp_path: Path, folder: Path) -> None:
    lines: list[str] = []
    prepared = prepare(data_config(tmp_path, folder), TokenizerConfig(), VOCAB_SIZE, lines.append)
    dataset, tokenizer = IndexedDataset(prepared.prefix), Tokenizer.load(prepared.tokenizer_path)
    documents = list(iter_documents(str(folder)))
    assert prepared.num_documents == dataset.num_documents == len(documents)
    assert prepared.num_tokens == dataset.num_tokens
    for index, text in enumerate(documents):
        ids = dataset.document(index).tolist()
        assert ids == [*tokenizer.encode(text), tokenizer.eos_id]
        assert tokenizer.decode(ids) == text
    assert prepared.tokenizer_sha256 == tokenizer.sha256
    said = "\n".join(lines)
    for words in ("reading data.path=", "training a tokenizer of 320 pieces", "encoding", "prepared"):
        assert words in said


def test_what_is_ready_is_reused_at_once_and_without_a_word(tmp_path: Path, folder: Path) -> None:
    data = data_config(tmp_path, folder)
    first = run(data)
    before = (first.prefix.parent / "manifest.json").stat().st_mtime_ns
    lines: list[str] = []
    with counted() as work:
        again = prepare(data, TokenizerConfig(), VOCAB_SIZE, lines.append)
    assert work.lines < 10_000
    assert again == first
    assert lines == []
    assert (first.prefix.parent / "manifest.json").stat().st_mtime_ns == before


def test_the_same_text_elsewhere_has_the_same_fingerprint(tmp_path: Path, folder: Path) -> None:
    first = run(data_config(tmp_path, folder))
    shutil.copytree(folder, tmp_path / "copy")
    second = run(data_config(tmp_path, tmp_path / "copy", cache_dir=str(tmp_path / "other")))
    assert second.prefix != first.prefix
    assert (second.fingerprint, second.tokenizer_sha256) == (first.fingerprint, first.tokenizer_sha256)


def test_another_text_or_setting_is_prepared_afresh(tmp_path: Path, folder: Path) -> None:
    data = data_config(tmp_path, folder)
    found = [run(data), run(data, VOCAB_SIZE + 1), run(data, character_coverage=1.0)]
    found.append(run(data_config(tmp_path, folder, max_corpus_mib=0.004)))
    (folder / "part0" / "deep" / "module0.py").write_text("changed = 1\n")
    found.append(run(data))
    assert len({prepared.prefix for prepared in found}) == len(found)
    assert found[-1].fingerprint != found[0].fingerprint
    # Neither the length of sequences nor the size of batches has a part in it.
    assert run(data_config(tmp_path, folder, seq_len=8, global_batch=2)) == found[-1]


def test_a_given_tokenizer_is_used(tmp_path: Path, folder: Path) -> None:
    made = run(data_config(tmp_path, folder))
    path = tmp_path / "given.model"
    shutil.copy(made.tokenizer_path, path)
    prepared = run(data_config(tmp_path, folder), path=str(path))
    assert prepared.tokenizer_sha256 == made.tokenizer_sha256
    assert prepared.fingerprint == made.fingerprint
    assert prepared.tokenizer_path.read_bytes() == path.read_bytes()
    with pytest.raises(ConfigError, match=r"model\.vocab_size=400 must equal the 320 pieces .*; use 320") as caught:
        run(data_config(tmp_path, folder), 400, path=str(path))
    assert caught.value.exit_code == 78


def test_a_tokenizer_alone_is_the_one_that_preparing_trains(tmp_path: Path, folder: Path) -> None:
    data, output = data_config(tmp_path, folder), tmp_path / "alone.model"
    alone = prepare_tokenizer(data, TokenizerConfig(), VOCAB_SIZE, output, no_report)
    assert alone.sha256 == run(data).tokenizer_sha256
    with pytest.raises(StorageError, match=r"alone\.model: File exists"):
        prepare_tokenizer(data, TokenizerConfig(), VOCAB_SIZE, output, no_report)


def test_indexed_tokens_are_used_as_they_are(tmp_path: Path, folder: Path) -> None:
    prepared = run(data_config(tmp_path, folder))
    for path in (prepared.prefix, f"{prepared.prefix}.bin", f"{prepared.prefix}.idx", prepared.prefix.parent):
        assert run(data_config(tmp_path, path)) == prepared
    foreign = tmp_path / "megatron" / "text_document"
    foreign.parent.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prepared.prefix}{suffix}", f"{foreign}{suffix}")
    found = run(data_config(tmp_path, foreign), path=str(prepared.tokenizer_path))
    assert (found.prefix, found.num_tokens, found.num_documents) == (foreign, prepared.num_tokens, 6)
    assert found.tokenizer_sha256 == prepared.tokenizer_sha256
    with pytest.raises(ConfigError, match=r"tokenizer\.path=unset must name the sentencepiece"):
        run(data_config(tmp_path, foreign))
    content = bytearray(Path(f"{foreign}.bin").read_bytes())
    content[-1] ^= 1
    Path(f"{foreign}.bin").write_bytes(content)
    assert run(data_config(tmp_path, foreign), path=str(prepared.tokenizer_path)).fingerprint != found.fingerprint
    Path(f"{foreign}.bin").unlink()
    with pytest.raises(StorageError, match=r"text_document\.bin: No such file"):
        run(data_config(tmp_path, foreign), path=str(prepared.tokenizer_path))


def test_a_prepared_folder_of_another_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    prepared = run(data_config(tmp_path, folder))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=321 must equal the 320 pieces"):
        run(data_config(tmp_path, prepared.prefix), 321)
    other = run(data_config(tmp_path, folder), 330).tokenizer_path
    with pytest.raises(ConfigError, match=r"tokenizer\.path=.* must be the tokenizer that made data\.path"):
        run(data_config(tmp_path, prepared.prefix), path=str(other))


def test_a_corpus_without_text_is_a_data_error(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": " \\n"}\n\n')
    (tmp_path / "files" / "deep").mkdir(parents=True)
    (tmp_path / "files" / "deep" / "empty.py").write_text("")
    (tmp_path / "files" / "picture.png").write_bytes(b"\x89PNG\0")
    cases = {"corpus": "no files", "empty.txt": "1 files", "blank.jsonl": "1 files", "files": "2 files, 1 of them"}
    for name, words in cases.items():
        with pytest.raises(DataError, match=rf"data\.path=.*{name} holds no text \({words}") as caught:
            run(data_config(tmp_path, tmp_path / name))
        assert caught.value.exit_code == 65
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_bad_input_leaves_the_cache_as_it_was(tmp_path: Path, folder: Path) -> None:
    data = data_config(tmp_path, folder)
    run(data)
    before = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.jsonl").write_text("{\n")
    os.mkfifo(tmp_path / "pipe")
    cases: list[tuple[int, object, int, dict[str, object]]] = [
        (78, folder, 100_000, {}),
        (78, folder, 10, {}),
        (65, tmp_path / "bad.txt", VOCAB_SIZE, {}),
        (65, tmp_path / "bad.jsonl", VOCAB_SIZE, {}),
        (74, tmp_path / "missing", VOCAB_SIZE, {}),
        (74, tmp_path / "pipe", VOCAB_SIZE, {}),
        (74, folder, VOCAB_SIZE, {"path": str(tmp_path / "missing.model")}),
        (74, folder, VOCAB_SIZE, {"path": str(tmp_path / "pipe")}),
        (65, folder, VOCAB_SIZE, {"path": str(tmp_path / "bad.txt")}),
    ]
    for code, path, vocab_size, settings in cases:
        with pytest.raises(DistLLMError) as caught:
            run(data_config(tmp_path, str(path)), vocab_size, **settings)
        assert caught.value.exit_code == code, str(caught.value)
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock") == before


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        with pytest.raises(StorageError, match=r"data\.cache_dir") as caught:
            run(data_config(tmp_path, folder, cache_dir=str(cache)))
        assert caught.value.exit_code == 74


def test_a_cache_inside_the_corpus_is_refused_unless_hidden(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.* must not lie in data\.path"):
        run(data_config(tmp_path, folder, cache_dir=str(folder / "cache")))
    hidden = data_config(tmp_path, folder, cache_dir=str(folder / ".cache"))
    assert run(hidden) == run(hidden)


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path: Path, folder: Path) -> None:
    def meddle(line: str) -> None:
        if line.startswith("encoding"):
            (folder / "new.py").write_text("late = 1\n")

    with pytest.raises(DataError, match="was changed while it was being read"):
        prepare(data_config(tmp_path, folder), TokenizerConfig(), VOCAB_SIZE, meddle)
    assert run(data_config(tmp_path, folder)).num_documents == 7


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "tokenizer.model", "manifest.json"])
def test_a_damaged_cache_is_refused_with_its_file_and_the_way_out(tmp_path: Path, folder: Path, name: str) -> None:
    data = data_config(tmp_path, folder)
    path = run(data).prefix.parent / name
    whole = path.read_bytes()
    for content in (b"", whole[:-2], whole + b"\0", None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"Delete the folder .* to prepare it again") as caught:
            run(data)
        assert caught.value.exit_code == 65
        assert name in str(caught.value)
    shutil.rmtree(path.parent)
    assert run(data).num_documents == 6


def test_a_damaged_tokenizer_of_the_same_size_is_refused(tmp_path: Path, folder: Path) -> None:
    prepared = run(data_config(tmp_path, folder))
    content = bytearray(prepared.tokenizer_path.read_bytes())
    content[len(content) // 2] ^= 4
    prepared.tokenizer_path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model is damaged: wrong checksum"):
        run(data_config(tmp_path, folder))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "another"},
        {"num_tokens": -1},
        {"num_tokens": "12"},
        {"surplus": 1},
        {"files": {"../../secret": {"num_bytes": 1, "sha256": "0" * 64}}},
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, folder: Path, change: dict[str, object]) -> None:
    path = run(data_config(tmp_path, folder)).prefix.parent / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"manifest\.json"):
        run(data_config(tmp_path, folder))


def test_the_standard_library_is_prepared_in_its_time_and_comes_back_unchanged(tmp_path: Path) -> None:
    """Processor time for 3 MiB, tokenizer of 4096 pieces included; all 10 MiB may take 80 s (40 on 2 cores)."""
    before = os.times()
    prepared = run(data_config(tmp_path, "stdlib", max_corpus_mib=3.0), 4096)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 24
    assert 700_000 < prepared.num_tokens < 1_500_000
    dataset, tokenizer = IndexedDataset(prepared.prefix), Tokenizer.load(prepared.tokenizer_path)
    for index, text in enumerate(iter_documents("stdlib", 3.0)):
        assert tokenizer.decode(dataset.document(index).tolist()) == text
