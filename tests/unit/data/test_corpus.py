"""Which text a path stands for: every kind of corpus, every kind of bad file, the same documents every time."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

import pytest

from dist_llm.data import corpus as corpus_module
from dist_llm.data.corpus import find_corpus, iter_documents, read_documents
from dist_llm.errors import ConfigError, DataError, ExitCode, StorageError
from dist_llm.types import RUN_LOCK
from tests.unit.data.corpora import source_text, write_folder


def test_the_standard_library_is_a_corpus_of_sources_without_tests_and_packages() -> None:
    corpus = find_corpus("stdlib")
    names = [file.name for file in corpus.files]
    assert len(names) > 100
    assert all(name.endswith(".py") for name in names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in names)
    assert corpus.signature() == find_corpus("stdlib").signature()
    assert sum(len(text) for text in iter_documents("stdlib", 1.0)) > 900_000


def test_a_folder_is_read_in_one_order_and_to_the_last_byte(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "corpus")
    texts = list(iter_documents(str(root)))
    assert texts == [source_text(number) for number in (0, 2, 4, 1, 3, 5)]
    named = root / "part1" / "named.txt"
    exact = b"\xef\xbb\xbfline\r\n\ttab\x0c\x00end"
    named.write_bytes(exact)
    assert [text.encode() for text in iter_documents(str(named))] == [exact]


def test_what_is_no_text_in_a_folder_is_passed_over_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    (root / ".git").mkdir(parents=True)
    (root / "__pycache__").mkdir()
    (root / ".git" / "config").write_text("hidden")
    (root / ".hidden").write_text("hidden")
    (root / "__pycache__" / "a.pyc").write_text("compiled")
    (root / "a.py").write_text("print(1)\n")
    (root / "empty.py").write_text("")
    (root / "blank.py").write_text(" \n\t\n")
    (root / "image.png").write_bytes(b"\x89PNG\x00\x01")
    (root / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "outside.py").write_text("secret = 1\n")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    skipped: dict[str, str] = {}
    texts = list(read_documents(find_corpus(str(root)), on_skip=skipped.__setitem__))
    assert texts == ["print(1)\n"]
    assert skipped == {"image.png": "binary", "latin.txt": "not UTF-8"}


def test_bytes_that_are_not_utf8_in_a_named_file_are_an_error_with_their_offset(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"fine text\n" * 3 + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"corpus\.txt is not UTF-8 text: byte 0xe9 at offset 33") as caught:
        list(iter_documents(str(path)))
    assert caught.value.exit_code == ExitCode.BAD_DATA


@pytest.mark.parametrize("limit", [7, 64, 1000])
def test_a_long_file_is_cut_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(corpus_module, "SECTION_BYTES", limit)
    rng = random.Random(0)
    text = "".join(rng.choice(["a", "é", "日", "😀", "\n" if limit > 7 else "b"]) for _ in range(700))
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    documents = list(iter_documents(str(path)))
    assert "".join(documents) == text
    assert len(documents) > 1
    assert all(len(document.encode()) <= limit for document in documents)
    path.write_bytes(text.encode() + b"\xff")
    with pytest.raises(DataError, match=f"at offset {len(text.encode())} "):
        list(iter_documents(str(path)))


@pytest.mark.parametrize("kib", [1, 3, 4, 1000])
def test_the_cap_is_kept_and_what_is_left_is_a_prefix(tmp_path: Path, kib: int) -> None:
    root = write_folder(tmp_path / "corpus")
    whole = "".join(iter_documents(str(root)))
    capped = "".join(iter_documents(str(root), kib / 1024))
    assert whole.startswith(capped)
    assert min(len(whole.encode()), kib * 1024) - 3 <= len(capped.encode()) <= kib * 1024


def test_jsonl_gives_the_text_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    texts = ["one\ntwo", "日本 😀", "end"]
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n\n")
    assert list(iter_documents(str(path))) == texts


BAD_LINES = {
    b"{not json": "not a JSON object",
    b'{"text": 3}': 'string "text"',
    b'{"body": "a"}': 'string "text"',
    b'["text"]': 'string "text"',
    b'{"text": "\\ud800"}': "surrogate",
    b'{"text": "caf\xe9"}': "not UTF-8: byte 0xe9 at offset 13",
    b"[" * 100_000: "not a JSON object",
    b'{"text": ' + b"1" * 5000 + b"}": "not a JSON object",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_json_line_is_an_error_with_file_and_line(tmp_path: Path, line: bytes) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "part.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"part\.jsonl:3: .*{BAD_LINES[line]}") as caught:
        list(iter_documents(str(root)))
    assert caught.value.exit_code == ExitCode.BAD_DATA


def test_an_endless_json_line_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "MAX_LINE_BYTES", 100)
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": "a" * 200}))
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: a line of over"):
        list(iter_documents(str(path)))


def test_what_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.py").write_text("a\n")
    cases = {
        "missing": "No such file",
        "pipe": "a FIFO",
        "dangling": "No such file",
        "closed/a.py/b": "Not a directory",
        "n" * 300: "File name too long",
    }
    for name, words in cases.items():
        with pytest.raises(StorageError, match=words) as caught:
            list(iter_documents(str(tmp_path / name)))
        assert caught.value.exit_code == ExitCode.IO
    with pytest.raises(StorageError, match="a device"):
        list(iter_documents("/dev/zero"))


def test_a_folder_and_a_file_without_permission_are_storage_errors() -> None:
    privileged = os.geteuid() == 0
    # Not tmp_path: nobody but its owner may enter that, and root, who may read everything, becomes nobody below.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        root = write_folder(Path(place) / "corpus", 1)
        for closed in (root / "part0" / "deep" / "module0.py", root / "part0"):
            closed.chmod(0)
            try:
                if privileged:
                    os.seteuid(65534)
                with pytest.raises(StorageError, match=rf"{closed.name}.*: Permission denied"):
                    list(iter_documents(str(root)))
            finally:
                if privileged:
                    os.seteuid(0)
                closed.chmod(0o755)


@pytest.mark.parametrize("path", ["", "  ", "a\0b", "~no-such-user-here/x"])
def test_a_path_that_is_none_is_a_config_error(path: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        list(iter_documents(path))


def test_the_signature_follows_names_sizes_and_times(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "corpus")
    before = find_corpus(str(root)).signature()
    assert find_corpus(str(root)).signature() == before
    file = root / "part0" / "deep" / "module0.py"
    os.utime(file, ns=(0, 0))
    touched = find_corpus(str(root)).signature()
    file.rename(file.with_name("other.py"))
    renamed = find_corpus(str(root)).signature()
    assert len({before, touched, renamed}) == 3


def test_a_run_inside_a_folder_is_not_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print(1)\n")
    before = find_corpus(str(tmp_path)).signature()
    run = tmp_path / "runs" / "default"
    (run / "checkpoints").mkdir(parents=True)
    for name in (RUN_LOCK, "config.yaml", "events.jsonl", "checkpoints/manifest.json"):
        (run / name).write_text("{}\n")
    assert list(iter_documents(str(tmp_path))) == ["print(1)\n"]
    assert find_corpus(str(tmp_path)).signature() == before


def test_in_a_folder_a_log_in_jsonl_is_passed_over_and_documents_are_documents(tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text('\n{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "log.jsonl").write_text('{"time": 1}\n')
    (tmp_path / "nothing.jsonl").write_text("\n")
    skipped: list[str] = []
    corpus = find_corpus(str(tmp_path))
    assert list(read_documents(corpus, on_skip=lambda name, reason: skipped.append(name))) == ["one", "two"]
    assert skipped == ["log.jsonl"]
    with pytest.raises(DataError, match='string "text"'):
        list(iter_documents(str(tmp_path / "log.jsonl")))
