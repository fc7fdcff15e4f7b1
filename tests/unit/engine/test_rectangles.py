"""A flat range is made up of few rectangles, in order, and bands of a stored tensor lie where they belong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dist_llm.engine.rectangles import Band, band_shards, rectangles


@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 6), (2, 3, 2), (2, 1, 3, 2)])
def test_rectangles_make_up_every_range(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        flat, whole = torch.arange(start, stop).float(), torch.full(shape, -1.0)
        found = list(rectangles(shape, start, stop))
        for rect in found:
            values = flat.narrow(0, rect.begin, math.prod(rect.sizes)).view(rect.sizes)
            whole[tuple(slice(at, at + n) for at, n in zip(rect.offsets, rect.sizes, strict=True))] = values
        wanted = torch.full((size,), -1.0)
        wanted[start:stop] = flat
        assert torch.equal(whole.flatten(), wanted), (start, stop)
        assert len(found) <= 2 * len(shape) - 1
        assert [rect.begin for rect in found] == sorted(rect.begin for rect in found)


def test_bands_are_views_without_padding() -> None:
    # Two stored rows of "a" (of five, the last of which is padding), then a row of "b".
    bands = [Band("a", (4, 3), (3, 0), (2, 3)), Band("b", (2, 3), (1, 0), (1, 3), 6)]
    flat = torch.arange(1.0, 9.0)
    shards = list(band_shards("model", flat, 1, bands, primary=True))
    assert [(s.name, s.offsets, s.data.flatten().tolist()) for s in shards] == [
        ("model.a", (3, 1), [1.0, 2.0]),
        ("model.b", (1, 0), [6.0, 7.0, 8.0]),
    ]
    shards[1].data.zero_()
    assert flat.tolist()[5:] == [0.0, 0.0, 0.0]
