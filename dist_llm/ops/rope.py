"""Rotary position embedding (Su et al. 2021) in the half-split form, with Llama-3 and YaRN frequency scaling.

    [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin],  angle = position * theta^(-2i/d)

Llama-3 stretches low frequencies by `factor` (Meta 2024); YaRN blends interpolation and extrapolation by wavelength and
scales attention (Peng et al. 2023). Tables are computed in fp64 and cast once. Kernels: kernels/rope.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dist_llm.ops.autograd import call_op, dense_like, register_op
from dist_llm.ops.backends import REFERENCE, WITH_KERNELS, kernel

SCHEMAS = {"rope": "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)"}


def inverse_frequencies(head_dim: int, theta: float) -> Float64[Tensor, " half"]:
    """Return the unscaled angular frequencies; half: head_dim / 2."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def llama3_frequencies(
    freqs: Float64[Tensor, " half"], factor: float, low: float, high: float, original: int
) -> Float64[Tensor, " half"]:
    """Divide frequencies of wavelength over original/low by `factor`, keep those under original/high, else blend."""
    wavelength = 2 * math.pi / freqs
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freqs / factor + smooth * freqs


def yarn_frequencies(
    freqs: Float64[Tensor, " half"], factor: float, fast: float, slow: float, original: int, theta: float
) -> Float64[Tensor, " half"]:
    """Blend interpolated and plain frequencies between `fast` and `slow` rotations in `original` tokens."""
    half = freqs.numel()

    def dim_of(rotations: float) -> float:
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = max(math.floor(dim_of(fast)), 0), min(math.ceil(dim_of(slow)), 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freqs / factor * ramp + freqs * (1 - ramp)


def yarn_attention_factor(factor: float) -> float:
    """Return YaRN's magnitude of the rotated vectors: 0.1 ln(factor) + 1."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation_table(
    freqs: Float64[Tensor, " half"], num_tokens: int, magnitude: float
) -> tuple[Float64[Tensor, "{num_tokens} half"], Float64[Tensor, "{num_tokens} half"]]:
    """Return cos and sin of every angle, times the magnitude."""
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float64), freqs)
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(
    x: Float[Tensor, "batch seq heads head_dim"], cos: Float[Tensor, "seq half"], sin: Float[Tensor, "seq half"]
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Rotate x by the tables (half: head_dim / 2), in the wider of their formats; result in x's."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_pair(
    query: Float[Tensor, "batch seq heads head_dim"],
    key: Float[Tensor, "batch seq kv_heads head_dim"],
    table: tuple[Float[Tensor, "seq half"], Float[Tensor, "seq half"]],
    backend: str = REFERENCE,
) -> tuple[Float[Tensor, "batch seq heads head_dim"], Float[Tensor, "batch seq kv_heads head_dim"]]:
    """Rotate query and key by the table (cos, sin; half: head_dim / 2), in the wider of their formats."""
    if backend in WITH_KERNELS:
        out: tuple[Tensor, Tensor] = call_op("rope", backend, query, key, *table, False)
        return out
    return rotate(query, *table), rotate(key, *table)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, cos, sin, ctx.inverse = inputs
    ctx.shapes = query.shape, key.shape
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Turn the gradients back, by the op itself: of any order. The table has none."""
    given = next((grad for grad in grads if grad is not None), None)
    if given is None:
        return None, None, None, None, None
    both = (given.new_zeros(shape) if x is None else x for x, shape in zip(grads, ctx.shapes, strict=True))
    out: tuple[Tensor, Tensor] = kernel("rope", ctx.backend)(*both, *ctx.saved_tensors, not ctx.inverse)
    return *out, None, None, None


def register(backend: str) -> None:
    """Tell torch the shapes and gradients of a backend's overloads; once, when they are defined."""
    register_op(
        "rope", backend, lambda query, key, cos, sin, inverse: (dense_like(query), dense_like(key)), _keep, _backward
    )


Scaling = Literal["none", "llama3", "yarn"]
