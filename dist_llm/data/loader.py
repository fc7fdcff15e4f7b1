"""Batches as a pure function of the step: nothing to save, nothing to lose, whatever the number of ranks.

    position = step * G + row;  sample i = samples_at(position);  tokens [i T, (i + 1) T), targets one token further

The corpus is one stream of tokens cut into samples of T = data.seq_len; process k of n reads rows [k G/n, (k + 1) G/n).
The last data.validation_fraction of the samples are kept for validation, which reads them in their own order.
Invariant: the slices of all processes, end to end, are the batch that one process would read.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dist_llm.config.inputs import DataConfig
from dist_llm.data.files import display
from dist_llm.data.indexed import IndexedDataset
from dist_llm.data.order import samples_at
from dist_llm.errors import ConfigError, DataError, LayoutError, Violation
from dist_llm.types import Batch, DataSlice

Int64Array = NDArray[np.int64]
Split = Literal["train", "validation"]


class TokenLoader:
    """Reads one process's share of every global batch. Ids are checked to be in [0, vocab_size) before they return."""

    def __init__(
        self,
        dataset: IndexedDataset,
        data: DataConfig,
        seed: int,
        data_slice: DataSlice,
        eos_id: int,
        vocab_size: int,
        split: Split = "train",
    ) -> None:
        """Raises DataError where the data cannot fill a sample, LayoutError where the slices would not be equal."""
        if data.global_batch % data_slice.count:
            rule = f"must be divisible by the {data_slice.count} parts that its processes read"
            raise LayoutError([Violation("data.global_batch", data.global_batch, rule)])
        self._dataset = dataset
        self._data = data
        self._seed = seed
        self._eos_id = eos_id
        self._vocab_size = vocab_size
        self._split = split
        rows = data.global_batch // data_slice.count
        self._rows = np.arange(data_slice.index * rows, (data_slice.index + 1) * rows, dtype=np.int64)
        train, validation = split_samples(dataset.num_tokens, data.seq_len, data.validation_fraction)
        self.num_samples = train if split == "train" else validation
        self._first = 0 if split == "train" else train
        if split == "validation" and validation == 0:
            rule = "must be above 0 to keep samples for validation"
            raise ConfigError([Violation("data.validation_fraction", data.validation_fraction, rule)])

    def batch(self, step: int) -> Batch:
        """Return this process's share of the global batch of `step` (from 0), [B, T]; validation wraps around.

        Raises DataError where the file has changed since it was opened or holds an id outside the vocabulary.
        """
        seq_len = self._data.seq_len
        positions = step * self._data.global_batch + self._rows
        if self._split == "train":
            samples = samples_at(positions, self.num_samples, self._seed)
        else:
            samples = self._first + positions % self.num_samples
        windows = self._dataset.windows(samples * seq_len, seq_len + 1)
        self._require_in_vocabulary(windows, samples)
        tokens = np.ascontiguousarray(windows[:, :-1])
        return Batch(
            step=step,
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(np.ascontiguousarray(windows[:, 1:])),
            samples=torch.from_numpy(positions),
            documents=torch.from_numpy(self._documents(tokens)) if self._data.document_mask else None,
        )

    def _documents(self, tokens: Int64Array) -> Int64Array:
        """Return the number of documents that ended before each token of its sample, [B, T]; eos ends its own."""
        ends = (tokens == self._eos_id).astype(np.int64)
        documents: Int64Array = np.cumsum(ends, axis=1) - ends
        return documents

    def _require_in_vocabulary(self, windows: Int64Array, samples: Int64Array) -> None:
        if windows.min() >= 0 and windows.max() < self._vocab_size:
            return
        bad = (windows < 0) | (windows >= self._vocab_size)
        row, column = (int(axis[0]) for axis in np.nonzero(bad))
        raise DataError(
            f"{display(self._dataset.path)} holds token {windows[row, column]} at position "
            f"{int(samples[row]) * self._data.seq_len + column}, outside model.vocab_size={self._vocab_size}: "
            "it is damaged or was made with another tokenizer"
        )


def split_samples(num_tokens: int, seq_len: int, validation_fraction: float) -> tuple[int, int]:
    """Return the number of samples for training and, from the tail, for validation (at least 1 of a fraction above 0).

    A sample takes seq_len tokens and one more as its last target. Raises DataError naming data.seq_len and the largest
    legal one where the tokens do not fill a sample of each kind.
    """
    num_samples = max(0, num_tokens - 1) // seq_len
    needed = 2 if validation_fraction else 1
    if num_samples < needed:
        kinds = "a training and a validation sample" if needed == 2 else "a sample"
        largest = (num_tokens - 1) // needed
        advice = f"use at most {largest}" if largest > 0 else "use a larger corpus"
        raise DataError(f"data.seq_len={seq_len} is too long for {num_tokens} tokens to fill {kinds}; {advice}")
    validation = max(1, int(num_samples * validation_fraction)) if validation_fraction else 0
    return num_samples - min(validation, num_samples - 1), min(validation, num_samples - 1)
