"""The step of Megatron-Core that peers.py times: its GPTModel, its DDP, its optimizer and its schedules, stock.

Layers are those of its local spec, without Transformer Engine and apex. ZeRO 1 is its distributed optimizer. On a CPU
it needs the same stand-ins for CUDA as our engine of that name (engine/megatron_cpu.py); they are in no hot path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers_steps import CannotRunError, Contestant, microbatches
from dist_llm.config.run import RunConfig
from dist_llm.engine.build import import_megatron
from dist_llm.errors import EngineUnavailable
from dist_llm.runtime.cpu_torch import staying_on_cpu
from dist_llm.runtime.mesh import Mesh
from dist_llm.runtime.variables import keep_variables
from dist_llm.types import Batch, DataSlice


def _settings(config: RunConfig) -> Any:
    """Return its TransformerConfig: the model, the layout, and its defaults."""
    from megatron.core.transformer import TransformerConfig

    model, parallel = config.model, config.parallel
    gated = model.activation == "swiglu"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else partial(F.gelu, approximate="tanh"),
        add_bias_linear=model.bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        deallocate_pipeline_outputs=True,
    )


def _model(config: RunConfig, settings: Any) -> Any:
    """Return this rank's stage of its GPTModel."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model = config.model
    learned = model.position == "learned"
    return GPTModel(
        settings,
        get_gpt_layer_local_spec(normalization=settings.normalization),
        model.vocab_size,
        model.max_seq_len,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="learned_absolute" if learned else "rope",
        rotary_base=int(model.rope.theta),
    )


def _wrapped(config: RunConfig, settings: Any, model: Any) -> tuple[Any, Any]:
    """Return the model in its DDP, and its optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from dist_llm.engine.megatron_cpu import name_types

    update, sharded = config.optimizer, config.parallel.zero == 1
    name_types(model.parameters())
    buffers = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    chunk = DistributedDataParallel(settings, buffers, model)
    rules = OptimizerConfig(
        optimizer="adam",
        lr=update.lr,
        weight_decay=update.weight_decay,
        adam_beta1=update.betas[0],
        adam_beta2=update.betas[1],
        adam_eps=update.eps,
        clip_grad=update.clip_norm,
        use_distributed_optimizer=sharded,
    )
    return chunk, get_megatron_optimizer(rules, [chunk], use_gloo_process_groups=False)


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.mean()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place


def _forward(source: Iterator[tuple[Tensor, Tensor]], chunk: Any) -> tuple[Tensor, Any]:
    """Run a microbatch through the stage; return its output and what makes a loss of it."""
    tokens, targets = next(source)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return chunk(tokens, positions, None, labels=targets), _mean


def _clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    """Clip as its own function does, which insists on gradients of CUDA's types."""
    coefficient = max_norm / (total_norm + 1e-6)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if grads and coefficient < 1:
        torch._foreach_mul_(grads, coefficient)


def build_megatron(config: RunConfig, mesh: Mesh) -> Contestant:
    """Return the step of its schedule and optimizer."""
    try:
        import_megatron(mesh.device)
    except EngineUnavailable as error:
        raise CannotRunError(str(error)) from error
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import optimizer as optimizer_module
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from dist_llm.engine.megatron_cpu import prepare_modules

    prepare_modules()
    optimizer_module.clip_grad_by_total_norm_fp32 = _clip
    parallel, data = config.parallel, config.data
    parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline, create_gloo_process_groups=False)
    with keep_variables(), staying_on_cpu():
        settings = _settings(config)
        chunk, optimizer = _wrapped(config, settings, _model(config, settings))
    settings.finalize_model_grads_func = finalize_model_grads
    run = get_forward_backward_func()
    count = data.global_batch // mesh.dp.size // data.microbatch

    def step(batch: Batch) -> float:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        with staying_on_cpu():
            found = run(
                forward_step_func=_forward,
                data_iterator=microbatches(batch, data.microbatch),
                model=chunk,
                num_microbatches=count,
                seq_length=data.seq_len,
                micro_batch_size=data.microbatch,
                forward_only=False,
            )
            optimizer.step()
        return float(sum(part["loss"] for part in found)) / len(found) if found else math.nan

    return Contestant(DataSlice(mesh.dp.index, mesh.dp.size), step)
