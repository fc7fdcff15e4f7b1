"""Learning rate and batch size from published power laws, each fitted on its authors' own sweeps.

    DeepSeek LLM   lr = 0.3118 C^-0.1250            B = 0.2920 C^0.3271 tokens          (arXiv 2401.02954)
    Step Law       lr = 1.782 N^-0.7122 D^0.3070    B = 0.5733 D^0.5713 tokens          (arXiv 2503.04715)
    OLMo ladder    lr = 0.0047 (N / 108e6)^(-1/3)   B = 160 (N / 108e6)^(2/3) x 2048    (after arXiv 2406.19146)

C = 6 N D FLOPs; N counts no embeddings. They hold for AdamW and a cosine or linear decay to near zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_LAW = "step-law"
"""Nearest to the best of 17 published (N, D) sweeps; see `make foresight`."""


@dataclass(frozen=True)
class BatchLaw:
    """Peak learning rate and batch in tokens as functions of parameters (no embeddings) and tokens."""

    name: str
    citation: str
    learning_rate: Callable[[float, float], float]
    batch_tokens: Callable[[float, float], float]


@dataclass(frozen=True)
class BatchAdvice:
    """What a law advises: peak learning rate, batch in tokens, and the same batch in sequences (one at least)."""

    law: str
    learning_rate: float
    batch_tokens: float
    batch_sequences: int


@dataclass(frozen=True)
class Recommendation:
    """The default law's advice, every law's own, and between which values they lie."""

    learning_rate: float
    batch_tokens: float
    batch_sequences: int
    each: tuple[BatchAdvice, ...]
    learning_rate_spread: tuple[float, float]
    batch_tokens_spread: tuple[float, float]


_OLMO_PARAMS = 108e6

BATCH_LAWS: dict[str, BatchLaw] = {
    law.name: law
    for law in (
        BatchLaw(
            "deepseek",
            "DeepSeek-AI 2024, arXiv 2401.02954",
            lambda num_params, tokens: 0.3118 * (6 * num_params * tokens) ** -0.1250,
            lambda num_params, tokens: 0.2920 * (6 * num_params * tokens) ** 0.3271,
        ),
        BatchLaw(
            "step-law",
            "Li et al. 2025, arXiv 2503.04715, medians of the bootstrap in the authors' repository",
            lambda num_params, tokens: 1.782 * num_params**-0.7122 * tokens**0.3070,
            lambda num_params, tokens: 0.5733 * tokens**0.5713,
        ),
        BatchLaw(
            "olmo-ladder",
            "Porian et al. 2024, arXiv 2406.19146, as the OLMo ladder (Bhagia et al. 2024, arXiv 2412.04403) runs it",
            lambda num_params, tokens: 0.0047 * (num_params / _OLMO_PARAMS) ** (-1 / 3),
            lambda num_params, tokens: 2048 * 160 * (num_params / _OLMO_PARAMS) ** (2 / 3),
        ),
    )
}


def advise(law: BatchLaw, num_params: float, tokens: float, seq_len: int) -> BatchAdvice:
    """Return what a law advises for N parameters without embeddings, `tokens`, and sequences of `seq_len` tokens."""
    batch = law.batch_tokens(num_params, tokens)
    return BatchAdvice(law.name, law.learning_rate(num_params, tokens), batch, max(1, round(batch / seq_len)))


def recommend(num_params: float, tokens: float, seq_len: int, law: str = DEFAULT_LAW) -> Recommendation:
    """Return the advice of one law with that of all and their spread; num_params counts no embeddings."""
    each = tuple(advise(entry, num_params, tokens, seq_len) for entry in BATCH_LAWS.values())
    chosen = next(advice for advice in each if advice.law == law)
    rates, batches = [advice.learning_rate for advice in each], [advice.batch_tokens for advice in each]
    return Recommendation(
        chosen.learning_rate,
        chosen.batch_tokens,
        chosen.batch_sequences,
        each,
        (min(rates), max(rates)),
        (min(batches), max(batches)),
    )


def nearest_setting(advice: BatchAdvice, settings: list[tuple[float, float]]) -> int:
    """Return the index of the (learning rate, batch tokens) that is nearest to the advice in logarithms."""
    log_rate, log_batch = math.log(advice.learning_rate), math.log(advice.batch_tokens)
    distances = [(math.log(rate) - log_rate) ** 2 + (math.log(batch) - log_batch) ** 2 for rate, batch in settings]
    return distances.index(min(distances))
