"""Megatron-Core's GPTModel from our config: its settings, its layers' make-up and this rank's chunks of it.

Layers are Transformer Engine's on CUDA where that is installed, else Megatron-Core's own with apex's LayerNorm or our
norms, which know sequence parallelism. Stages are dealt as in the native engine (Megatron's pipeline layout).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.package_info import MAJOR, MINOR
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn
from torch.nn import functional

from dist_llm.accounting.params import padded_vocab
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.engine.megatron_attention import CoreAttention
from dist_llm.engine.megatron_fused import Fused
from dist_llm.engine.recipe import DTYPES
from dist_llm.models.norm import build_norm
from dist_llm.models.rope import scaled_frequencies
from dist_llm.ops.causal_attention import Attend
from dist_llm.parallel.context import build_attention
from dist_llm.runtime.mesh import Mesh

_DIVIDES = (MAJOR, MINOR) < (0, 19)
"""Whether Megatron-Core divides the losses of experts by tp x cp ranks and by sequences; from 0.19 on it does not."""

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


def _expert_settings(model: ModelConfig, copies: int, microbatch: int) -> dict[str, Any]:
    """Return what Megatron-Core is told of experts.

    copies: tp x cp ranks, if it divides their losses by them; microbatch: sequences, if it divides the balance's.
    """
    moe = model.moe
    if not model.num_expert_layers:
        return {}
    settings: dict[str, Any] = {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(model.has_experts(layer)) for layer in range(model.num_layers)],
        "moe_ffn_hidden_size": model.expert_width,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score,
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalize,
        "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1 else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.balance_loss else "none",
        "moe_aux_loss_coeff": moe.balance_loss * copies * microbatch,
        "moe_z_loss_coeff": moe.z_loss * copies if moe.z_loss else None,
        "moe_token_dispatcher_type": "alltoall",
    }
    if moe.num_shared:
        settings["moe_shared_expert_intermediate_size"] = moe.num_shared * model.expert_width
    if moe.bias_rate:
        settings |= {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": moe.bias_rate}
    return settings


def _layout_settings(config: RunConfig, stages: list[StagePlan], cuda: bool, fused: Fused) -> dict[str, Any]:
    """Return what Megatron-Core is told of the layout, the formats and its own fusions."""
    parallel, compute = config.parallel, config.precision.compute
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
        "bf16": compute == "bf16",
        "fp16": compute == "fp16",
        "params_dtype": DTYPES[compute],
        "pipeline_dtype": DTYPES[compute],
        "calculate_per_token_loss": True,
        "perform_initialization": False,
        "use_cpu_initialization": not cuda,
        "deallocate_pipeline_outputs": True,
        "batch_p2p_comm": False,
        # Its fused GELU is the approximation by tanh, and takes no other activation with biases.
        "bias_activation_fusion": cuda and config.model.activation == "swiglu",
        "bias_dropout_fusion": cuda,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": fused.accumulation,
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


def _spec(model: ModelConfig, experts: bool, fused: Fused, attend: Attend | None) -> Any:
    """Return the make-up of a layer. attend: our attention, in place of Megatron-Core's or Transformer Engine's."""
    num_experts = model.moe.num_experts if experts else None
    if fused.layers:
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts, experts, model.qk_norm)
    else:
        spec = get_gpt_layer_local_spec(num_experts, qk_layernorm=model.qk_norm, normalization="RMSNorm")
        parts = spec.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = FusedLayerNorm if fused.norms else _norm_of(model)
    attention = spec.submodules.self_attention.submodules
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = _norm_of(model.model_copy(update={"norm": "rmsnorm"}))
    if attend is not None:
        attention.core_attention = ModuleSpec(module=CoreAttention, params={"attend": attend})
    return spec


def _layers(model: ModelConfig, stage: StagePlan, fused: Fused, attend: Attend | None) -> Any:
    """Return the make-up of a stage's layers and of the last norm."""
    norm: Any = FusedLayerNorm if fused.norms else _norm_of(model)
    if fused.layers:
        from megatron.core.extensions import transformer_engine

        norm = transformer_engine.TENorm
    specs = [_spec(model, model.has_experts(layer), fused, attend) for layer in stage.layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def chosen_attention(config: RunConfig, mesh: Mesh, fused: Fused) -> Attend | None:
    """Return our attention where Megatron-Core's cannot do what the config asks for, else None."""
    theirs = fused.layers and config.parallel.context_method == "ring"
    ours = config.data.document_mask or (mesh.cp.size > 1 and not theirs)
    return build_attention(mesh.context) if ours else None


def build_chunks(
    config: RunConfig, stages: list[StagePlan], mesh: Mesh, fused: Fused, attend: Attend | None
) -> tuple[TransformerConfig, list[GPTModel]]:
    """Return Megatron-Core's settings and this rank's chunks of the model, weights not yet filled."""
    model = config.model
    cuda = mesh.device.type == "cuda"
    settings = TransformerConfig(
        **_model_settings(model),
        **_expert_settings(model, *((mesh.tp.size * mesh.cp.size, config.data.microbatch) if _DIVIDES else (1, 1))),
        **_layout_settings(config, stages, cuda, fused),
    )
    mine = [stage for stage in stages if stage.index % mesh.pp.size == mesh.pp.index]
    chunks = [
        GPTModel(
            settings,
            _layers(model, stage, fused, attend),
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
