"""Megatron-Core's gradient buffers and optimizers, and the masters that these keep.

    ZeRO 0   masters are the weights (fp32), or whole copies of them          the gradient is all-reduced
    ZeRO 1   masters are a range of each weight, where the buffer is cut      reduce-scattered, weights are gathered

Experts have an optimizer of their own, because their replicas are other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from dist_llm.config.run import RunConfig
from dist_llm.engine.recipe import DTYPES


@dataclass(frozen=True)
class Master:
    """What an optimizer updates: a flat range of a parameter, from element `start` on, and its state."""

    flat: Tensor
    parameter: nn.Parameter
    start: int
    state: dict[str, Any]


def wrap_chunks(config: RunConfig, settings: Any, models: Sequence[nn.Module], device: torch.device) -> list[Any]:
    """Return the chunks in the compute format, with gradient buffers in fp32."""
    overlap, sharded = config.engine.overlap, config.parallel.zero == 1
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and sharded,
        use_distributed_optimizer=sharded,
        bucket_size=(config.parallel.bucket_mib << 20) // 4,
    )
    chunks = []
    for number, model in enumerate(models):
        model.to(device)
        part = model if config.precision.compute == "fp32" else Float16Module(settings, model)
        chunks.append(DistributedDataParallel(settings, buffers, part, disable_bucketing=number > 0))
    return chunks


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    """Return what Megatron-Core's optimizer is told; the learning rate is set at every step."""
    optimizer, precision = config.optimizer, config.precision
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_norm,
        bf16=precision.compute == "bf16",
        fp16=precision.compute == "fp16",
        params_dtype=DTYPES[precision.compute],
        initial_loss_scale=precision.initial_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=1,
        use_distributed_optimizer=config.parallel.zero == 1,
        overlap_param_gather=config.engine.overlap and config.parallel.zero == 1,
    )


def build_optimizer(config: RunConfig, chunks: list[Any]) -> tuple[Any, list[Any]]:
    """Return Megatron-Core's optimizer, and those that it is made of. Collective over the world."""
    optimizer = get_megatron_optimizer(_optimizer_config(config), chunks, use_gloo_process_groups=False)
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return optimizer, list(parts)


def _pairs(part: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the parameters of an optimizer with their masters, in fp32."""
    if _is_sharded(part):
        groups = [
            *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
            *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
        ]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        groups = [
            *zip(part.float16_groups, part.fp32_from_float16_groups, strict=True),
            *((group, group) for group in part.fp32_from_fp32_groups),
        ]
    else:
        groups = [] if part.optimizer is None else [(g["params"], g["params"]) for g in part.optimizer.param_groups]
    for models, mains in groups:
        yield from zip(models, mains, strict=True)


def masters(parts: Sequence[Any]) -> Iterator[Master]:
    """Yield what the optimizers update, on this rank."""
    for part in parts:
        for parameter, main in _pairs(part):
            start = part._get_model_param_range_map(parameter)["param"].start if _is_sharded(part) else 0
            yield Master(main.detach().view(-1), parameter, start, part.optimizer.state[main])


def make_moments(parts: Sequence[Any]) -> None:
    """Make the optimizers' state before the first step, so that a checkpoint can be loaded into it."""
    for inner in _inner(parts):
        counts = isinstance(inner, torch.optim.AdamW)
        for main in (main for group in inner.param_groups for main in group["params"]):
            moments = {"exp_avg": torch.zeros_like(main.data), "exp_avg_sq": torch.zeros_like(main.data)}
            inner.state[main] = {**moments, "step": torch.zeros(())} if counts else moments


def set_steps(parts: Sequence[Any], updates: int) -> None:
    """Tell Adam how many updates there were: torch's by tensor, those of apex and Transformer Engine by group."""
    for inner in _inner(parts):
        for group in inner.param_groups:
            if not isinstance(inner, torch.optim.AdamW):
                group["step"] = updates
                continue
            for main in group["params"]:
                inner.state[main]["step"].fill_(updates)


def copy_masters(parts: Sequence[Any]) -> None:
    """Make the weights those of the masters, as far as they are on this rank. Issues nothing."""
    for part in parts:
        if isinstance(part, DistributedOptimizer | Float16OptimizerWithFloat16Params):
            part._copy_main_params_to_model_params()


def _inner(parts: Sequence[Any]) -> list[Any]:
    """Return the Adams inside; an optimizer without parameters has none."""
    return [part.optimizer for part in parts if part.optimizer is not None]


def _is_sharded(part: Any) -> bool:
    return isinstance(part, DistributedOptimizer)
