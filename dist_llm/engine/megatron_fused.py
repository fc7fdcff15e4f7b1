"""Which fused parts Megatron-Core's layers are made of: Transformer Engine's or apex's, where they are the real ones.

Adam is not among them: Megatron-Core itself takes Transformer Engine's, then apex's, then torch's.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM

from dist_llm.config.extensions import find_extension
from dist_llm.config.run import RunConfig

_ACCUMULATION = "fused_weight_gradient_mlp_cuda"
"""The compiled part of apex that adds a weight's gradient up in fp32 as it is computed."""


@dataclass(frozen=True)
class Fused:
    """What is fused. layers: Transformer Engine's; norms: apex's LayerNorm; accumulation: into fp32 gradients."""

    layers: bool = False
    norms: bool = False
    accumulation: bool = False


def find_fused(config: RunConfig, cuda: bool) -> Fused:
    """Return what serves this model here; all of it needs CUDA. Both libraries' LayerNorm has a bias."""
    model = config.model
    if not cuda:
        return Fused()
    whole = model.norm == "rmsnorm" or model.bias
    wanted = config.engine.transformer_engine == "auto" and whole
    layers = wanted and find_extension("transformer-engine").usable
    apex = find_extension("apex").usable
    norms = apex and not layers and model.norm == "layernorm" and whole and HAVE_FUSED_LAYER_NORM
    # The head is Megatron-Core's own linear also under Transformer Engine, and knows apex's way alone.
    return Fused(layers, norms, apex and importlib.util.find_spec(_ACCUMULATION) is not None)
