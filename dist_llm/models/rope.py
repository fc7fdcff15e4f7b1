"""The rotary table of a model: built on first use for a length, device and format, then kept."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_llm.config.model import ModelConfig, RopeConfig
from dist_llm.ops import rope as ops


def scaled_frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return (float64 frequencies [head_dim / 2], magnitude) under the configured scaling."""
    freqs = ops.inverse_frequencies(head_dim, config.theta)
    original = config.original_max_seq_len
    if config.scaling == "llama3":
        low, high = config.low_freq_factor, config.high_freq_factor
        return ops.llama3_frequencies(freqs, config.factor, low, high, original), 1.0
    if config.scaling == "yarn":
        fast, slow = config.beta_fast, config.beta_slow
        magnitude = config.attention_factor
        if magnitude is None:
            magnitude = ops.yarn_attention_factor(config.factor)
        return ops.yarn_frequencies(freqs, config.factor, fast, slow, original, config.theta), magnitude
    return freqs, 1.0


class RopeTable:
    """cos and sin for positions 0..T-1, shared by all layers; not a parameter and not saved."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, head_dim / 2] for like [B, T, H, head_dim], in fp32 (fp64 for fp64 inputs)."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (like.shape[1], like.device, dtype)
        if key not in self._tables:
            freqs, magnitude = scaled_frequencies(self._config.rope, self._config.head_width)
            cos, sin = ops.rotation_table(freqs, like.shape[1], magnitude)
            self._tables[key] = (cos.to(like.device, dtype), sin.to(like.device, dtype))
        return self._tables[key]
