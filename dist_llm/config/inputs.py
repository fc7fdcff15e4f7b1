"""What the model reads: the corpus, how it is cut into sequences, and the tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_llm.config.base import Count, PathText, Section


class DataConfig(Section):
    """What is read, and how it is cut into batches."""

    path: PathText = "stdlib"
    """Text (folder, file or JSONL) or indexed tokens (prefix of `.bin`, `.idx`); stdlib: Python's standard library."""
    cache_dir: PathText = "~/.cache/dist_llm"
    """Folder for what is prepared from the corpus (tokenizer, indexed tokens), shared by runs."""
    max_corpus_mib: float | None = Field(None, gt=0, le=2**30)
    """Most text that is read, from the beginning of the corpus, in MiB of UTF-8; null: all."""
    seq_len: Count
    """Length of a training sequence, in tokens."""
    global_batch: Count
    """Sequences that one step trains on, over all ranks."""
    microbatch: Count
    """Sequences in one forward and backward of a data rank; a step accumulates over microbatches."""
    document_mask: bool = False
    """Whether attention stays inside a document where a sequence holds several."""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the sequences, from the end of the corpus, kept for validation (one at least); 0: none."""


class TokenizerConfig(Section):
    """sentencepiece BPE, trained on the corpus or given."""

    name: Literal["sentencepiece"] = "sentencepiece"
    """Kind of tokenizer (Kudo & Richardson 2018)."""
    path: PathText | None = None
    """sentencepiece `.model` file of model.vocab_size pieces; null: trained on the corpus, or that of prepared data."""
    character_coverage: float = Field(0.9995, gt=0, le=1)
    """Share of the text's characters, by occurrence, that training gives pieces of their own."""
    byte_fallback: bool = True
    """Whether a character without a piece is spelled in UTF-8 bytes (256 of the pieces), not as the unknown piece."""
    train_mib: float = Field(8.0, gt=0, le=2**20)
    """Most text that the tokenizer is trained on, spread evenly over the corpus, in MiB."""
