"""sentencepiece BPE with byte fallback: any text to token ids and back, unchanged (Kudo & Richardson 2018).

No normalisation, no dummy prefix, white space kept: decode(encode(text)) == text for source code too.
sentencepiece writes a space as U+2581 inside pieces, so a U+2581 of the text itself is given as its three bytes.
Training reads the corpus in pieces of some lines, so that a line end and its indentation can become one token.
Invariant: same documents and settings, same model file, whatever the number of cores.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from dist_llm.config.inputs import TokenizerConfig
from dist_llm.data.corpus import MIB
from dist_llm.data.files import display, open_regular, storage_errors, write_synced
from dist_llm.errors import ConfigError, DataError, Violation

Int32Array = NDArray[np.int32]

UNKNOWN_ID, EOS_ID = 0, 1
MAX_MODEL_BYTES = 256 * MIB
_SPACE_MARK = "\u2581"
_TRAIN_CHARACTERS = 1024
_ENCODE_CHARACTERS = 1 << 16
_ENCODE_PARTS = 64
_TOO_MANY = re.compile(r"Vocabulary size too high .* value <= (\d+)")
_TOO_FEW = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


def cut_at_lines(text: str, limit: int) -> Iterator[str]:
    """Yield `text` in parts of at most `limit` characters, each ending at a line end where there is one."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def train_tokenizer(
    documents: Iterable[str], model_path: Path, vocab_size: int, config: TokenizerConfig, num_bytes: int
) -> None:
    """Train `vocab_size` pieces on config.train_mib MiB spread evenly over `documents` (num_bytes in all).

    Writes `model_path`, a new file, flushed to the disk. Raises ConfigError naming model.vocab_size and the nearest
    legal value where the corpus supports fewer pieces or its characters alone need more; DataError, StorageError.
    """
    # Unknown, end-of-document, the bytes and at least one character.
    floor = 2 + (256 if config.byte_fallback else 0) + 1
    share = min(1.0, config.train_mib * MIB / max(1, num_bytes))
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_spread(documents, share),
            model_writer=model,
            # A size below the floor would fail without saying which is the smallest legal one.
            vocab_size=max(vocab_size, floor),
            model_type="bpe",
            byte_fallback=config.byte_fallback,
            character_coverage=config.character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            hard_vocab_limit=True,
            max_sentence_length=4 * _TRAIN_CHARACTERS + 1,
            # The number is written into the model file, so it is not the number of cores.
            num_threads=1,
            unk_id=UNKNOWN_ID,
            eos_id=EOS_ID,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise _training_error(str(error), vocab_size) from error
    if vocab_size < floor:
        raise _training_error(f"Vocabulary size is smaller than required_chars. {vocab_size} vs {floor}", vocab_size)
    write_synced(model_path, model.getvalue())


def _spread(documents: Iterable[str], share: float) -> Iterator[str]:
    """Yield that share of the documents' parts, evenly spaced, so that every region of the corpus is heard."""
    taken = seen = 0
    for document in documents:
        for part in cut_at_lines(document, _TRAIN_CHARACTERS):
            seen += 1
            if taken < seen * share:
                taken += 1
                yield part


def _training_error(message: str, vocab_size: int) -> ConfigError | DataError:
    if match := _TOO_MANY.search(message):
        rule = f"is more than the corpus supports, which has {match[1]} distinct pieces"
        return ConfigError([Violation("model.vocab_size", vocab_size, rule, (int(match[1]),))])
    if match := _TOO_FEW.search(message):
        rule = f"must be at least {match[1]}, for the bytes and the characters that tokenizer.character_coverage keeps"
        return ConfigError([Violation("model.vocab_size", vocab_size, rule, (int(match[1]),))])
    return DataError(f"no tokenizer can be trained on this corpus: {message}")


class Tokenizer:
    """A loaded sentencepiece model. Ids are in [0, vocab_size); eos_id ends every document of a data set."""

    def __init__(self, model: bytes, path: Path) -> None:
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"{display(path)} is not a sentencepiece model: {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if not 0 <= self.eos_id < self.vocab_size:
            raise DataError(f"{display(path)} has no </s> piece, which must end every document")
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._mark_ids = self._spell_mark()

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `.model` file. Raises StorageError where it cannot be read, DataError where it is something else."""
        with open_regular(path) as file, storage_errors("read", path):
            model = file.read(MAX_MODEL_BYTES + 1)
        if len(model) > MAX_MODEL_BYTES:
            raise DataError(f"{display(path)} is not a sentencepiece model: over {MAX_MODEL_BYTES // MIB} MiB")
        return cls(model, path)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without end-of-document."""
        return [int(token) for token in self.encode_batch([text])[0]]

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[Int32Array]:
        """Return the token ids of each text, [length]; long ones are encoded in parts, on `num_threads` cores."""
        parts: list[str] = []
        marks: list[list[int]] = []
        ends: list[int] = []
        for text in texts:
            for index, run in enumerate(text.split(_SPACE_MARK) if self._mark_ids else [text]):
                # A mark of the text stands before each run but the first.
                pieces = list(cut_at_lines(run, _ENCODE_CHARACTERS)) or [""]
                marks += [self._mark_ids if index else [], *([] for _ in pieces[1:])]
                parts += pieces
            ends.append(len(parts))
        encoded: list[Int32Array] = []
        # Lists of ids take ten times the memory of arrays, so few of them live at a time.
        for start in range(0, len(parts), _ENCODE_PARTS):
            group = slice(start, start + _ENCODE_PARTS)
            ids = self._processor.encode(parts[group], num_threads=num_threads)
            encoded += [np.array(mark + part, np.int32) for mark, part in zip(marks[group], ids, strict=True)]
        return [np.concatenate(encoded[start:end]) for start, end in pairwise([0, *ends])]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; control tokens give none. Raises DataError on an id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"token {token} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return str(self._processor.decode(ids))

    def _spell_mark(self) -> list[int]:
        """Return the byte tokens of U+2581, or none where the model has no bytes or prefixes what it encodes."""
        ids = [int(self._processor.piece_to_id(f"<0x{byte:02X}>")) for byte in _SPACE_MARK.encode()]
        spelled = all(self._processor.is_byte(token) for token in ids)
        prefixes = self._processor.id_to_piece(self._processor.encode("a")[0]).startswith(_SPACE_MARK)
        return ids if spelled and not prefixes else []


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
