"""The one definition of model FLOPs: matrix products and causal attention, forward and backward, nothing recomputed.

    forward = 2 * (matmul parameters) per token + 4 heads head_dim (causal pairs) per sequence, layer
    step    = 3 * forward                                    (PaLM, Chowdhery et al. 2022, appendix B)

The head's projection counts whether tied or not; the embedding look-up does not; vocabulary padding does not.
Of experts those of the top k count.
"""

from __future__ import annotations

from dist_llm.accounting.params import layer_parameters
from dist_llm.config.model import ModelConfig


def layer_matmul_parameters(model: ModelConfig, index: int) -> int:
    """Return the number of weights of a layer that multiply every token; of its experts those of the top k."""
    matrices = [spec for spec in layer_parameters(model, index) if len(spec.shape) >= 2]
    chosen = sum(spec.numel for spec in matrices if spec.expert) * model.moe.top_k // max(1, model.moe.num_experts)
    return chosen + sum(spec.numel for spec in matrices if not spec.expert)


def matmul_parameters(model: ModelConfig) -> int:
    """Return the number of weights that multiply every token: the layers' matrices and the output projection."""
    dense = min(model.moe.num_dense_layers, model.num_layers) if model.moe.num_experts else 0
    first, last = layer_matmul_parameters(model, 0), layer_matmul_parameters(model, model.num_layers - 1)
    return dense * first + (model.num_layers - dense) * last + model.vocab_size * model.hidden_size


def causal_pairs(seq_len: int) -> int:
    """Return how many (query, key) pairs a causal mask keeps in a sequence of `seq_len` tokens."""
    return seq_len * (seq_len + 1) // 2


def forward_flops(model: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of the forward pass of one sequence."""
    attention = 4 * model.num_heads * model.head_width * causal_pairs(seq_len) * model.num_layers
    return 2 * matmul_parameters(model) * seq_len + attention


def step_flops(model: ModelConfig, seq_len: int, global_batch: int) -> int:
    """Return the FLOPs of forward and backward of one global batch."""
    return 3 * forward_flops(model, seq_len) * global_batch
