"""What the model reads: the corpus, how it is cut into sequences, and the tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_llm.config.base import Count, PathText, Section


class DataConfig(Section):
    """What is read. global_batch and microbatch count sequences; path: folder, text or JSONL file, or `.bin` prefix.

    `path: stdlib` is the embedded corpus: the Python standard library's source and documentation strings.
    cache_dir holds what was prepared from it (corpus, tokenizer, indexed tokens), apart from run.dir.
    """

    path: PathText = "stdlib"
    cache_dir: PathText = "~/.cache/dist_llm"
    max_corpus_mib: float | None = Field(None, gt=0, le=2**30)
    seq_len: Count
    global_batch: Count
    microbatch: Count
    document_mask: bool = False
    validation_fraction: float = Field(0.0, ge=0, lt=1)


class TokenizerConfig(Section):
    """sentencepiece BPE. path null: trained on the corpus with model.vocab_size pieces; else a `.model` file."""

    name: Literal["sentencepiece"] = "sentencepiece"
    path: PathText | None = None
    character_coverage: float = Field(0.9995, gt=0, le=1)
    byte_fallback: bool = True
    train_mib: float = Field(8.0, gt=0, le=2**20)
