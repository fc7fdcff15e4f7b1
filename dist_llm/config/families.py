"""What a published family of models fixes beside its sizes, and how its sizes usually follow from each other."""

from __future__ import annotations

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
