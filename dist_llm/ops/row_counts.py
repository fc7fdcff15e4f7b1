"""Counts that decide shapes, as numbers of the host; a tensor without values (fake, meta) stands for equal shares.

So a layer of experts can be built and stepped on tensors that have only shapes, as if its router were balanced.
"""

from __future__ import annotations

from jaxtyping import Bool, Int64
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(x: Tensor) -> bool:
    """Return whether there are numbers behind a tensor."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def row_counts(counts: Int64[Tensor, " groups"], total: int) -> list[int]:
    """Return the counts, which sum to `total`. Waits for the device."""
    if has_values(counts):
        return counts.tolist()
    groups = counts.numel()
    return [total // groups + (index < total % groups) for index in range(groups)]


def kept_rows(rows: Int64[Tensor, " rows"], keep: Bool[Tensor, " rows"], at_most: int) -> Int64[Tensor, " kept"]:
    """Return the rows that are kept, `at_most` of them. Waits for the device."""
    return rows[keep] if has_values(rows) else rows[:at_most]
