"""Batches depend on the step alone: any number of processes reads the same samples, targets one token further."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_llm.data.indexed import IndexedDataset, IndexedWriter, bin_path
from dist_llm.data.loader import Split, TokenLoader, split_samples
from dist_llm.data.order import sample_at
from dist_llm.errors import ConfigError, DataError, LayoutError
from dist_llm.types import Batch, DataSlice
from tests.unit.data.corpora import data_config
from tests.work import counted

EOS = 1
VOCAB_SIZE = 5000
WHOLE = DataSlice(0, 1)


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    """100 samples of 16 and a few more tokens, in documents of 37: token number n is n + 2 but at document ends."""
    with IndexedWriter(tmp_path / "tokens", VOCAB_SIZE) as writer:
        for start in range(0, 1610, 37):
            writer.add([*range(start + 2, min(start + 38, 1611)), EOS])
    return IndexedDataset(tmp_path / "tokens")


def loader(
    dataset: IndexedDataset,
    part: DataSlice = WHOLE,
    seed: int = 0,
    split: Split = "train",
    **settings: object,
) -> TokenLoader:
    config = data_config(dataset.path.parent, "unused", **settings)
    return TokenLoader(dataset, config, seed, part, EOS, VOCAB_SIZE, split)


def test_a_row_is_its_sample_and_the_target_is_the_next_token(dataset: IndexedDataset) -> None:
    reader = loader(dataset, seed=5)
    assert reader.num_samples == 100
    for step in (0, 3, 12, 1000):
        batch = reader.batch(step)
        assert batch.step == step
        assert batch.tokens.shape == batch.targets.shape == (8, 16)
        assert {batch.tokens.dtype, batch.targets.dtype, batch.samples.dtype} == {torch.int64}
        assert batch.tokens.is_contiguous()
        assert batch.targets.is_contiguous()
        assert batch.documents is None
        assert batch.samples.tolist() == list(range(step * 8, step * 8 + 8))
        for row, position in enumerate(batch.samples.tolist()):
            start = 16 * sample_at(position, 100, 5)
            assert batch.tokens[row].tolist() == dataset.tokens[start : start + 16].tolist()
            assert batch.targets[row].tolist() == dataset.tokens[start + 1 : start + 17].tolist()


def joined(dataset: IndexedDataset, step: int, count: int, **settings: object) -> Batch:
    parts = [loader(dataset, DataSlice(index, count), **settings).batch(step) for index in range(count)]  # type: ignore[arg-type]
    documents = [part.documents for part in parts if part.documents is not None]
    return Batch(
        step,
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.samples for part in parts]),
        torch.cat(documents) if documents else None,
    )


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_any_number_of_processes_reads_the_same_batch(dataset: IndexedDataset, count: int, split: Split) -> None:
    settings: dict[str, object] = {"split": split, "document_mask": True, "validation_fraction": 0.1}
    for step in (0, 1, 50):
        whole, parts = joined(dataset, step, 1, **settings), joined(dataset, step, count, **settings)
        assert torch.equal(whole.tokens, parts.tokens)
        assert torch.equal(whole.targets, parts.targets)
        assert torch.equal(whole.samples, parts.samples)
        assert whole.documents is not None
        assert parts.documents is not None
        assert torch.equal(whole.documents, parts.documents)


def test_an_epoch_is_every_sample_once_and_the_next_one_another_order(dataset: IndexedDataset) -> None:
    reader = loader(dataset, global_batch=20)
    epochs = [torch.cat([reader.batch(step).tokens for step in range(5 * n, 5 * n + 5)]) for n in (0, 1)]
    # Two samples may begin alike (with end-of-document); all of a sample is its own.
    seen = [{tuple(row) for row in epoch.tolist()} for epoch in epochs]
    assert len(seen[0]) == 100
    assert seen[0] == seen[1]
    assert not torch.equal(epochs[0], epochs[1])


def test_validation_is_the_tail_in_its_own_order(dataset: IndexedDataset) -> None:
    train = loader(dataset, validation_fraction=0.1)
    validation = loader(dataset, validation_fraction=0.1, split="validation")
    assert (train.num_samples, validation.num_samples) == (90, 10)
    first = validation.batch(0).tokens
    assert first.reshape(-1).tolist() == dataset.tokens[90 * 16 : 98 * 16].tolist()
    assert torch.equal(validation.batch(1).tokens[2:], first[:6])
    assert torch.equal(validation.batch(5).tokens, first)
    rows = {tuple(row) for step in range(100) for row in train.batch(step).tokens.tolist()}
    assert len(rows) == 90
    assert not rows & {tuple(row) for row in first.tolist()}
    with pytest.raises(ConfigError, match=r"data\.validation_fraction=0\.0 must be above 0"):
        loader(dataset, split="validation")


def test_documents_are_numbered_inside_their_sample(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "tokens", VOCAB_SIZE) as writer:
        for document in ([5, 6, EOS], [EOS], [7, 8, 9, EOS], [5]):
            writer.add(document)
    batch = loader(
        IndexedDataset(tmp_path / "tokens"), seq_len=8, global_batch=1, microbatch=1, document_mask=True
    ).batch(0)
    assert batch.documents is not None
    assert batch.tokens.tolist() == [[5, 6, 1, 1, 7, 8, 9, 1]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]
    # End-of-document is learnt like any token, and so is what follows it.
    assert batch.targets.tolist() == [[6, 1, 1, 7, 8, 9, 1, 5]]


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_data_shorter_than_a_sequence_names_the_longest_legal_one(dataset: IndexedDataset, fraction: float) -> None:
    with pytest.raises(
        DataError, match=r"data\.seq_len=5000 is too long for \d+ tokens.*; use at most (\d+)"
    ) as caught:
        loader(dataset, seq_len=5000, validation_fraction=fraction)
    assert caught.value.exit_code == 65
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    assert loader(dataset, seq_len=largest, validation_fraction=fraction).batch(0).tokens.shape == (8, largest)
    with pytest.raises(DataError, match="too long"):
        loader(dataset, seq_len=largest + 1, validation_fraction=fraction)


def test_almost_no_tokens_are_a_data_error() -> None:
    for num_tokens in (0, 1):
        with pytest.raises(DataError, match="use a larger corpus"):
            split_samples(num_tokens, 16, 0.0)


def test_splits_keep_a_sample_of_each_kind() -> None:
    assert split_samples(161, 16, 0.0) == (10, 0)
    assert split_samples(161, 16, 0.01) == (9, 1)
    assert split_samples(161, 16, 0.5) == (5, 5)
    assert split_samples(161, 16, 0.99) == (1, 9)


def test_slices_that_are_not_equal_are_refused(dataset: IndexedDataset) -> None:
    with pytest.raises(LayoutError, match=r"data\.global_batch=8 must be divisible by the 3 parts"):
        loader(dataset, DataSlice(0, 3))


@pytest.mark.parametrize(("token", "code"), [(VOCAB_SIZE, 8), (65535, 8), (-1, 4)])
def test_an_id_that_the_model_lacks_is_refused_before_it_is_returned(tmp_path: Path, token: int, code: int) -> None:
    with IndexedWriter(tmp_path / "tokens", 65000 if code == 8 else 70000) as writer:
        writer.add([3] * 33)
    bits = "<u2" if code == 8 else "<i4"
    tokens = np.full(33, 3, dtype=bits)
    tokens[20] = token
    bin_path(tmp_path / "tokens").write_bytes(tokens.tobytes())
    reader = loader(IndexedDataset(tmp_path / "tokens"), global_batch=1, seed=0)
    # Sample 1 holds the token.
    step = next(step for step in range(2) if sample_at(step, 2, 0) == 1)
    reader.batch(1 - step)
    words = rf"tokens\.bin holds token {token} at position 20, outside model\.vocab_size=5000"
    with pytest.raises(DataError, match=words):
        reader.batch(step)


def test_batches_are_cut_from_the_mapping_whole(tmp_path: Path) -> None:
    """Work is done once a batch, not once for each of these 8 million tokens."""
    with IndexedWriter(tmp_path / "tokens", VOCAB_SIZE) as writer:
        writer.add(np.arange(2_000_000) % VOCAB_SIZE)
    reader = loader(IndexedDataset(tmp_path / "tokens"), seq_len=4096, global_batch=64)
    with counted() as work:
        for step in range(32):
            reader.batch(step)
    assert work.lines < 50_000
