"""The order of samples: a keyed bijection of each epoch, computed where it is needed, with no index to build.

    epoch, place = divmod(position, num_samples);  sample = walk(Feistel(place; key(seed, epoch)))

A Feistel network permutes the 2^(2h) numbers that cover num_samples; a result outside is permuted again until it is
inside (cycle walking; Black & Rogaway 2002), fewer than four times on average. Rounds mix with splitmix64.
Invariant: a pure function of (seed, position, num_samples) alone, the same on every machine, layout and release.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = tuple(np.uint64(number * int(_GOLDEN) % 2**64) for number in range(1, 7))
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MAX_SAMPLES = 2**62


def sample_at(position: int, num_samples: int, seed: int) -> int:
    """Return which sample of [0, num_samples) is seen at `position` (from 0) of the run."""
    return int(samples_at(np.asarray([position], dtype=np.int64), num_samples, seed)[0])


def samples_at(positions: Int64Array, num_samples: int, seed: int) -> Int64Array:
    """Return the samples, [N], at positions [N] of the run; num_samples in [1, 2^62), seed in [0, 2^63)."""
    if not 1 <= num_samples < _MAX_SAMPLES:
        raise ValueError(f"num_samples={num_samples} must be in [1, 2^62)")
    epochs, places = np.divmod(positions, num_samples)
    keys = _mix(_mix(np.full(len(positions), seed, dtype=np.uint64)) ^ epochs.astype(np.uint64))
    half = np.uint64(max(1, ((num_samples - 1).bit_length() + 1) // 2))
    samples = places.astype(np.uint64)
    outside = np.arange(len(samples))
    while len(outside):
        samples[outside] = _feistel(samples[outside], keys[outside], half)
        outside = outside[samples[outside] >= np.uint64(num_samples)]
    return samples.astype(np.int64)


def _feistel(values: UInt64Array, keys: UInt64Array, half: np.uint64) -> UInt64Array:
    """Permute [0, 2^(2 half)) under each value's own key."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in _ROUND_KEYS:
        left, right = right, left ^ (_mix(right ^ (keys + round_key)) & mask)
    return (left << half) | right


def _mix(values: UInt64Array) -> UInt64Array:
    """Spread every bit over all 64 (splitmix64; Steele, Lea & Flood 2014). Wraps modulo 2^64."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
