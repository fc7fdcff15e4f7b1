"""The rotary table of a model: built on first use for a device and format, and anew when it is too short."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dist_llm.config.model import ModelConfig, RopeConfig
from dist_llm.ops import rope as ops
from dist_llm.ops.context_share import ContextShare


def scaled_frequencies(config: RopeConfig, head_dim: int) -> tuple[Float64[Tensor, " half"], float]:
    """Return (frequencies, half: head_dim / 2; magnitude) under the configured scaling."""
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
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def prepare(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the tables of at least `length` positions for inputs of a format, built when they are not there."""
        key = (device, torch.float64 if dtype == torch.float64 else torch.float32)
        if key not in self._tables or len(self._tables[key][0]) < length:
            freqs, magnitude = scaled_frequencies(self._config.rope, self._config.head_width)
            # Generation asks for one more token each time: the next power of two.
            cos, sin = ops.rotation_table(freqs, 1 << (length - 1).bit_length(), magnitude)
            self._tables[key] = (cos.to(*key), sin.to(*key))
        return self._tables[key]

    def __call__(
        self, like: Float[Tensor, "batch seq heads head_dim"], context: ContextShare
    ) -> tuple[Float[Tensor, "seq half"], Float[Tensor, "seq half"]]:
        """Return cos and sin for the positions of `like`, a share of each sequence, in fp32 (fp64 for fp64 inputs).

        half: head_dim / 2.
        """
        length = like.shape[1] * context.ranks
        cos, sin = self.prepare(length, like.device, like.dtype)
        if context.ranks == 1:
            return cos[:length], sin[:length]
        positions = context.positions(like.shape[1], like.device)
        return cos[positions], sin[positions]
