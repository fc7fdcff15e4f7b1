"""The order of samples: each epoch once, epochs and seeds apart, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest

from dist_llm.data.order import sample_at, samples_at

MASK = 2**64 - 1


def mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def reference(position: int, num_samples: int, seed: int) -> int:
    """The order in Python's own integers, one number at a time."""
    epoch, value = divmod(position, num_samples)
    key = mix(mix(seed) ^ epoch)
    half = 1
    while 1 << 2 * half < num_samples:
        half += 1
    while True:
        left, right = value >> half, value % (1 << half)
        for number in range(1, 7):
            left, right = right, left ^ mix(right ^ ((key + number * 0x9E3779B97F4A7C15) & MASK)) % (1 << half)
        value = left << half | right
        if value < num_samples:
            return value


@pytest.mark.parametrize("num_samples", [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097, 65537])
def test_each_epoch_is_every_sample_once(num_samples: int) -> None:
    for epoch in (0, 1, 5):
        positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
        samples = samples_at(positions, num_samples, seed=3)
        assert np.array_equal(np.sort(samples), np.arange(num_samples))


def test_the_order_is_the_written_down_one() -> None:
    for num_samples, seed in [(1, 0), (2, 5), (10, 0), (1000, 7), (1_000_003, 2**63 - 1), (2**40 + 1, 12)]:
        positions = [0, 1, 2, num_samples - 1, num_samples, 3 * num_samples + 1, 2**61]
        expected = [reference(position, num_samples, seed) for position in positions]
        assert samples_at(np.array(positions), num_samples, seed).tolist() == expected
        assert [sample_at(position, num_samples, seed) for position in positions] == expected


def test_the_order_never_changes_between_releases() -> None:
    """A run that resumes under a later release must see the samples that it has not seen."""
    golden = [9, 8, 6, 4, 3, 0, 7, 2, 1, 5, 4, 0, 2, 3, 8, 1, 7, 6, 9, 5]
    assert samples_at(np.arange(20), 10, 0).tolist() == golden
    assert sample_at(12345678901, 1_000_003, 2**63 - 1) == 28210


def test_epochs_and_seeds_are_apart() -> None:
    count = 2000
    orders = [
        samples_at(np.arange(epoch * count, (epoch + 1) * count), count, seed) for epoch in (0, 1) for seed in (0, 1)
    ]
    for index, order in enumerate(orders):
        for other in (np.arange(count), *orders[:index]):
            # Two random orders agree at one place on average.
            assert np.count_nonzero(order == other) < 12


def test_the_order_is_mixed_well() -> None:
    """Samples seen one after the other are unrelated, and every sample is first about as often as any other."""
    count = 4096
    order = samples_at(np.arange(count), count, 9).astype(float)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
    firsts = np.bincount([sample_at(0, 16, seed) for seed in range(1600)], minlength=16)
    assert firsts.min() > 60
    assert firsts.max() < 140


def test_a_batch_may_span_epochs_in_any_order() -> None:
    positions = np.array([25, 3, 9, 10, 99, 3])
    assert samples_at(positions, 10, 4).tolist() == [sample_at(int(position), 10, 4) for position in positions]
    assert samples_at(np.arange(0), 10, 4).tolist() == []


def test_sizes_outside_the_range_are_refused() -> None:
    for num_samples in (0, -1, 2**62):
        with pytest.raises(ValueError, match="num_samples"):
            sample_at(0, num_samples, 0)
