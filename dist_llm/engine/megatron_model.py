"""Megatron-Core's GPTModel from our config: its settings, its layers' make-up and this rank's chunks of it.

Layers are Transformer Engine's on CUDA where that is installed, else Megatron-Core's own with our norms, which know
sequence parallelism. Stages are dealt as in the native engine (Megatron's pipeline layout), names are global.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn
from torch.nn import functional

from dist_llm.accounting.params import padded_vocab
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.models.norm import build_norm
from dist_llm.models.rope import scaled_frequencies
from dist_llm.runtime.mesh import Mesh

_ACTIVATIONS: dict[str, Any] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "swiglu": functional.silu,
}


def _model_settings(model: ModelConfig) -> dict[str, Any]:
    """Return what Megatron-Core is told of the model."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_width,
        "ffn_hidden_size": model.ffn_hidden_size,
        "normalization": "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": model.activation == "swiglu",
        "activation_func": _ACTIVATIONS[model.activation],
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.bias,
        "qk_layernorm": model.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
    }


def _layout_settings(config: RunConfig, stages: list[StagePlan], cuda: bool) -> dict[str, Any]:
    """Return what Megatron-Core is told of the layout, the formats and its own fusions."""
    parallel, compute = config.parallel, config.precision.compute
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "bf16": compute == "bf16",
        "fp16": compute == "fp16",
        "params_dtype": DTYPES[compute],
        "pipeline_dtype": DTYPES[compute],
        "calculate_per_token_loss": True,
        "perform_initialization": False,
        "use_cpu_initialization": not cuda,
        "deallocate_pipeline_outputs": True,
        "batch_p2p_comm": False,
        "bias_activation_fusion": cuda,
        "bias_dropout_fusion": cuda,
        "masked_softmax_fusion": cuda,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    if parallel.pipeline > 1:
        settings["virtual_pipeline_model_parallel_size"] = parallel.chunks if parallel.chunks > 1 else None
        settings["pipeline_model_parallel_layout"] = [_parts(stage) for stage in stages]
    if parallel.recompute == "full":
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if config.engine.fp8 != "none":
        settings["fp8"] = config.engine.fp8
    return settings


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parts(stage: StagePlan) -> list[str]:
    return ["embedding"] * stage.first + ["decoder"] * len(stage.layers) + ["loss"] * stage.last


def _norm_of(model: ModelConfig) -> type:
    """Return a class that makes our norms as Megatron-Core asks for them."""

    class Norm:
        def __new__(cls, config: Any, hidden_size: int, eps: float, **kwargs: Any) -> Any:
            norm = build_norm(model, hidden_size)
            for parameter in norm.parameters():
                nn.init.ones_(parameter)
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            return norm

    return Norm


def _layers(model: ModelConfig, stage: StagePlan, engine: bool) -> Any:
    """Return the make-up of a stage's layers. engine: of Transformer Engine's."""
    if engine:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=[spec] * len(stage.layers), layer_norm=TENorm)
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization="RMSNorm")
    norm = _norm_of(model)
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if model.qk_norm:
        attention = parts.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = _norm_of(model.model_copy(update={"norm": "rmsnorm"}))
    return TransformerBlockSubmodules(layer_specs=[spec] * len(stage.layers), layer_norm=norm)


def build_chunks(
    config: RunConfig, stages: list[StagePlan], mesh: Mesh, transformer_engine: bool
) -> tuple[TransformerConfig, list[GPTModel]]:
    """Return Megatron-Core's settings and this rank's chunks of the model, weights not yet filled."""
    model = config.model
    cuda = mesh.device.type == "cuda"
    settings = TransformerConfig(**_model_settings(model), **_layout_settings(config, stages, cuda))
    mine = [stage for stage in stages if stage.index % mesh.pp.size == mesh.pp.index]
    chunks = [
        GPTModel(
            settings,
            _layers(model, stage, transformer_engine),
            padded_vocab(model.vocab_size, mesh.tp.size),
            model.max_seq_len,
            pre_process=stage.first,
            post_process=stage.last,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type={"learned": "learned_absolute"}.get(model.position, model.position),
            rotary_base=int(model.rope.theta),
            vp_stage=number if len(mine) > 1 else None,
        )
        for number, stage in enumerate(mine)
    ]
    for chunk in chunks:
        if model.position == "rope":
            frequencies, _ = scaled_frequencies(model.rope, model.head_width)
            chunk.rotary_pos_emb.inv_freq = frequencies.to(mesh.device, torch.float32)
    return settings, chunks
