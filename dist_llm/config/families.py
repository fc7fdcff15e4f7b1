"""What a published family of models fixes beside its sizes, and how its sizes usually follow from each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    "llama": {
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
}
"""Options by family: Radford et al. 2019; Touvron et al. 2023."""

FFN_ALIGNMENT = 256
"""SwiGLU's inner width is rounded up to a multiple of this (Touvron et al. 2023), where the model is that wide."""


def usual_ffn_width(family: str, hidden_size: int) -> int:
    """Return the inner width of a feed-forward layer: 4 x hidden for GELU, 8/3 x hidden rounded up for SwiGLU."""
    if FAMILIES[family]["activation"] != "swiglu":
        return 4 * hidden_size
    multiple = FFN_ALIGNMENT if hidden_size >= FFN_ALIGNMENT else 8
    return -(-8 * hidden_size // (3 * multiple)) * multiple


def usual_head_width(hidden_size: int, wanted: int) -> int:
    """Return the width of a head: `wanted`, or half of it, else the even divisor nearest to it in ratio, else all."""
    for usual in (wanted, wanted // 2):
        if hidden_size % usual == 0:
            return usual
    even = [width for width in range(2, 8 * wanted, 2) if hidden_size % width == 0] or [hidden_size]
    return min(even, key=lambda width: abs(math.log(width / wanted)))
