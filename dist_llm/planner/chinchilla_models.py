"""Parameters of Chinchilla's own models, to compare this project's counter with Hoffmann et al. 2022, Table A9.

    counted = parameters of a GPT of that shape, positions apart  +  layers x hidden x (heads x head width)

Those models know positions as Transformer-XL does (Dai et al. 2019): each layer projects relative positions by one more
matrix, a fifth beside queries, keys, values and output. Our models have no such matrix; it alone is added here. Token
table tied, 32 000 pieces, RMSNorm (Rae et al. 2021, Gopher, whose architecture they share).
"""

from __future__ import annotations

from dist_llm.accounting.params import num_parameters
from dist_llm.config.model import ModelConfig

VOCAB_SIZE = 32000


def chinchilla_shape(hidden_size: int, ffn_hidden_size: int, head_dim: int, num_heads: int, layers: int) -> ModelConfig:
    """Return the model of a row of Table A9 without its relative positions."""
    return ModelConfig(
        family="gpt2",
        num_layers=layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        head_dim=head_dim,
        ffn_hidden_size=ffn_hidden_size,
        vocab_size=VOCAB_SIZE,
        max_seq_len=2048,
        position="none",
        norm="rmsnorm",
        activation="gelu",
        bias=True,
        tie_embeddings=True,
    )


def relative_position_parameters(model: ModelConfig) -> int:
    """Return the parameters of the projections of relative positions of all layers (Dai et al. 2019, section 3.3)."""
    return model.num_layers * model.hidden_size * model.num_heads * model.head_width


def chinchilla_parameters(hidden_size: int, ffn_hidden_size: int, head_dim: int, num_heads: int, layers: int) -> int:
    """Return the parameters of a row of Table A9, embeddings included."""
    model = chinchilla_shape(hidden_size, ffn_hidden_size, head_dim, num_heads, layers)
    return num_parameters(model) + relative_position_parameters(model)
