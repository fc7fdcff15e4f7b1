"""Random numbers as a pure function of (key, counter): the same on every device, layout and number of ranks.

    h = splitmix64(counter * golden + key);  uniform = (h >> 11 + 1/2) / 2^53;  normal = Box-Muller of two uniforms

splitmix64: Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (2014). Invariant: element i of a
tensor depends on (key, i) alone, so a shard draws exactly what the whole tensor would hold there.
"""

from __future__ import annotations

import hashlib
import math

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits as an unsigned value."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def key_of(*parts: object) -> int:
    """Return a 64-bit signed key for a tuple of names and numbers."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift_right(x: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Shift right without copying the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def hash_counter(counter: Int64[Tensor, "*#shape"], key: int | Int64[Tensor, "*#shape"]) -> Int64[Tensor, "*shape"]:
    """Return 64 well-mixed bits (int64, same shape) for each counter (int64) under `key` (broadcastable)."""
    x = counter * _GOLDEN + key
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(counter: Int64[Tensor, "*shape"], key: int) -> Float64[Tensor, "*shape"]:
    """Return float64 uniforms in (0, 1), one for each int64 counter."""
    return (_shift_right(hash_counter(counter, key), 11).double() + 0.5) * 2.0**-53


def normal(counter: Int64[Tensor, "*shape"], key: int) -> Float64[Tensor, "*shape"]:
    """Return float64 standard normals, one for each int64 counter (Box & Muller 1958)."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(counter * 2, key)))
    return radius * torch.cos(2.0 * math.pi * uniform(counter * 2 + 1, key))


def keep_mask(
    counter: Int64[Tensor, "*#shape"], key: int | Int64[Tensor, "*#shape"], drop: float
) -> Bool[Tensor, "*shape"]:
    """Return bool, True with probability 1 - drop, for each int64 counter under `key` (broadcastable)."""
    threshold = min(max(int(drop * 2.0**64) - 2**63, -(2**63)), 2**63 - 1)
    return hash_counter(counter, key) >= threshold
