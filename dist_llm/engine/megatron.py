"""The Megatron-Core engine: its GPTModel, process groups, schedules, gradient buffers and (distributed) optimizer.

Ours are the initial weights, the loss, the learning rate and the meaning of a step, so it trains what the native engine
trains. Masters are filled, saved and loaded as rectangles of logical tensors (rectangles.py); the model follows them.
Megatron-Core keeps one layout in module globals (`parallel_state`): one such engine at a time in a process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from dist_llm.accounting.stages import plan_stages
from dist_llm.config.run import RunConfig
from dist_llm.engine.megatron_cpu import building_on_cpu, name_types
from dist_llm.engine.megatron_model import DTYPES, build_chunks
from dist_llm.engine.megatron_names import Names, is_split
from dist_llm.engine.model import splittable
from dist_llm.engine.rectangles import Band, band_shards
from dist_llm.ops.context_share import ContextShare
from dist_llm.optim.schedule import learning_rate
from dist_llm.parallel.cross_entropy import cross_entropy_sum
from dist_llm.parallel.shards import LocalShard
from dist_llm.runtime.mesh import Mesh
from dist_llm.types import IGNORE_INDEX, Batch, DataSlice, LossSum, StepResult, TensorShard, TrainState


class MegatronEngine:
    """One optimizer step on one global batch by Megatron-Core over (pp, dp, cp, tp)."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._context = ContextShare(mesh.cp.index, mesh.cp.size)
        self.data_slice = DataSlice(mesh.dp.index, mesh.dp.size)
        self._microbatch_tokens = config.data.microbatch * config.data.seq_len
        self._num_microbatches = config.data.global_batch // (mesh.dp.size * config.data.microbatch)
        self._step, self._num_updates = 0, 0
        _initialize_parallel_state(config)
        on_device = contextlib.nullcontext() if mesh.device.type == "cuda" else building_on_cpu()
        with on_device:
            self._build()
        self._fill()

    def _build(self) -> None:
        """Build the chunks, their gradient buffers and the optimizer."""
        config, mesh = self._config, self._mesh
        stages = plan_stages(config.model, config.parallel.num_stages)
        engine = mesh.device.type == "cuda" and _has_transformer_engine(config)
        self._settings, models = build_chunks(config, stages, mesh, engine)
        names = Names(config.model, mesh.tp.index, mesh.tp.size)
        mine = [stage for stage in stages if stage.index % mesh.pp.size == mesh.pp.index]
        self._bands: dict[nn.Parameter, tuple[list[Band], bool]] = {}
        for stage, model in zip(mine, models, strict=True):
            for name, parameter in model.named_parameters():
                copy = name == "output_layer.weight" and config.model.tie_embeddings
                self._bands[parameter] = (names.bands(name, parameter, stage.layers), copy)
                if is_split(name):  # Megatron-Core says so of the weights that it initialises itself
                    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self._chunks = _wrap(config, self._settings, models, mesh.device)
        if mesh.device.type != "cuda":
            name_types(self._bands)
        self._optimizer = get_megatron_optimizer(_optimizer_config(config), self._chunks, use_gloo_process_groups=False)
        self._parts = (
            self._optimizer.chained_optimizers
            if isinstance(self._optimizer, ChainedOptimizer)
            else [self._optimizer]
        )
        self._settings.finalize_model_grads_func = self._finish_gradients
        if config.precision.compute == "fp16":
            self._settings.grad_scale_func = self._optimizer.scale_loss
        if self._chunks[0].ddp_config.overlap_grad_reduce:
            waits = [chunk.no_sync for chunk in self._chunks]
            self._settings.no_sync_func = waits if len(waits) > 1 else waits[0]
        self._run = get_forward_backward_func()

    @torch.no_grad()
    def _fill(self) -> None:
        """Make the optimizer's state and give masters and weights their initial values."""
        for part in self._parts:
            inner = part.optimizer
            for group in [] if inner is None else inner.param_groups:
                for main in group["params"]:
                    moments = {"exp_avg": torch.zeros_like(main.data), "exp_avg_sq": torch.zeros_like(main.data)}
                    steps = {"step": torch.zeros(())} if isinstance(inner, torch.optim.AdamW) else {}
                    inner.state[main] = {**steps, **moments}
        initialise = splittable(self._config.model, self._config.run.seed).initialise
        for main, *_ in self._mains():
            main.zero_()
        for shard in self._shards("model"):
            name = shard.name.removeprefix("model.")
            extent = tuple(shard.data.shape)
            facts = (shard.primary, False, False)
            initialise(LocalShard(name, None, shard.data, shard.shape, shard.offsets, extent, *facts))  # type: ignore[arg-type]
        self._take_masters()

    def _mains(self) -> Iterator[tuple[Tensor, nn.Parameter, int, dict[str, Any]]]:
        """Yield each master as a flat tensor, its parameter, where in that it begins, and its optimizer state."""
        for part in self._parts:
            for parameter, main in _pairs(part):
                start = part._get_model_param_range_map(parameter)["param"].start if _is_sharded(part) else 0
                yield main.detach().view(-1), parameter, start, part.optimizer.state[main]

    def _shards(self, kind: str) -> Iterator[TensorShard]:
        """Yield this rank's rectangles of the masters (`model`) or of a moment."""
        for main, parameter, start, state in self._mains():
            bands, copy = self._bands[parameter]
            flat = main if kind == "model" else state[kind.removeprefix("optimizer.")].view(-1)
            split = getattr(parameter, "tensor_model_parallel", False)
            first = self._config.parallel.zero == 1 or self._mesh.zero.index == 0
            primary = first and not copy and (split or self._mesh.tp.index == 0)
            yield from band_shards(kind, flat, start, bands, primary)

    def _take_masters(self) -> None:
        """Make the weights those of the masters. Issues one all-gather a bucket over zero under ZeRO-1."""
        for part in self._parts:
            if isinstance(part, DistributedOptimizer | Float16OptimizerWithFloat16Params):
                part._copy_main_params_to_model_params()
        if self._config.parallel.zero == 1:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def train_step(self, batch: Batch) -> StepResult:
        """Update the weights by one global batch; `batch` is this rank's share of it.

        Issues what Megatron-Core's layout needs, and one all-reduce of two numbers over the world. A step whose
        gradient is not finite changes nothing, on every rank alike.
        """
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss, tokens = self._totals(self._forward_backward(batch, forward_only=False), batch)
        lr = learning_rate(self._step, self._config.optimizer.lr, self._config.schedule, self._config.run.steps)
        norm = math.inf if self._optimizer.prepare_grads() else float(self._optimizer.get_grad_norm())
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self._update(lr, norm)
        self._step += 1
        return StepResult(loss / max(1, tokens), norm, lr, tokens, skipped=not finite)

    def _update(self, lr: float, norm: float) -> None:
        """Clip the gradients by their norm and let the optimizer step."""
        clip = self._config.optimizer.clip_norm
        coefficient = clip / (norm + 1e-6)
        if 0 < coefficient < 1:
            torch._foreach_mul_([main.grad for main in self._optimizer.get_parameters()], coefficient)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self._config.optimizer.weight_decay * group["wd_mult"]
        self._optimizer.step_with_ready_grads()
        self._num_updates += 1

    def eval_step(self, batch: Batch) -> LossSum:
        """Return the loss sum of one global batch. Issues the forward's collectives and one over the world."""
        for chunk in self._chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                sums = self._forward_backward(batch, forward_only=True)
        finally:
            for chunk in self._chunks:
                chunk.train()
        return LossSum(*self._totals(sums, batch))

    def _forward_backward(self, batch: Batch, forward_only: bool) -> list[dict[str, Tensor]]:
        """Run the schedule; return the loss sums of the microbatches, none except on the last stage."""
        device, size = self._mesh.device, self._config.data.microbatch
        tokens, targets = (self._context.take(part.to(device)) for part in (batch.tokens, batch.targets))
        rows = list(zip(tokens.split(size), targets.split(size), strict=True))
        sources = [iter(rows) for _ in self._chunks]
        found: list[dict[str, Tensor]] = self._run(
            forward_step_func=self._forward,
            data_iterator=sources if len(sources) > 1 else sources[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=self._num_microbatches,
            seq_length=self._config.data.seq_len,
            micro_batch_size=size,
            forward_only=forward_only,
        )
        return found

    def _forward(self, source: Iterator[tuple[Tensor, Tensor]], chunk: nn.Module) -> tuple[Tensor, Any]:
        """Run a microbatch through a chunk; return its output and what makes a loss of it."""
        tokens, targets = next(source)
        positions = self._context.positions(tokens.shape[1], tokens.device).expand_as(tokens)
        return chunk(tokens, positions, None), partial(self._loss, targets)

    def _loss(
        self, targets: Int64[Tensor, "batch seq"], logits: Float[Tensor, "batch seq columns"]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss in tokens of a microbatch, the counted tokens, and the sum. Two all-reduces over tp."""
        total = cross_entropy_sum(logits, targets, self._config.model.vocab_size, self._mesh.tp)
        counted = (targets != IGNORE_INDEX).sum().int()
        return total / self._microbatch_tokens, counted, {"loss": total.detach()}

    def _finish_gradients(self, chunks: list[nn.Module], num_tokens: Tensor | None = None, **more: Any) -> None:
        """Let Megatron-Core finish the gradients and divide them by the counted tokens of the global batch."""
        units = None if num_tokens is None else num_tokens.float() / self._microbatch_tokens
        finalize_model_grads(chunks, units, **more)

    def _totals(self, sums: list[dict[str, Tensor]], batch: Batch) -> tuple[float, int]:
        """Return the loss sum and the counted tokens of the global batch. One all-reduce over the world."""
        local = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)
        if sums and self._mesh.tp.index == 0:
            local[0] = torch.stack([part["loss"] for part in sums]).double().sum()
            local[1] = (self._context.take(batch.targets) != IGNORE_INDEX).sum()
        dist.all_reduce(local, group=self._mesh.world.group)
        loss, tokens = local.tolist()
        return loss, int(tokens)

    def state(self) -> TrainState:
        """Return model and optimizer rectangles by logical name, and the facts that are not tensors."""
        kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
        tensors = tuple(shard for kind in kinds for shard in self._shards(kind))
        scaler = self._scaler()
        facts: dict[str, object] = {
            "step": self._step,
            "optimizer_updates": self._num_updates,
            "compute": self._config.precision.compute,
            "loss_scale": 1.0 if scaler is None else float(scaler.scale),
            "loss_scale_good_steps": 0 if scaler is None else scaler._growth_tracker,
        }
        return TrainState(tensors, facts)

    def restore(self, facts: dict[str, object]) -> None:
        """Take over masters that were loaded in place, step and update count, and a loss scale where both use one."""
        self._take_masters()
        self._step = int(str(facts["step"]))
        self._num_updates = int(str(facts["optimizer_updates"]))
        for part in self._parts:
            inner = part.optimizer
            for group in [] if inner is None else inner.param_groups:
                if "step" in group:
                    group["step"] = self._num_updates
                for main in group["params"]:
                    if "step" in inner.state[main]:
                        inner.state[main]["step"].fill_(self._num_updates)
        scaler = self._scaler()
        if scaler is not None and facts["compute"] == "fp16":
            scaler._scale.fill_(float(str(facts["loss_scale"])))
            scaler._growth_tracker = int(str(facts["loss_scale_good_steps"]))

    def _scaler(self) -> Any:
        """Return the loss scaler of fp16, or None."""
        return getattr(self._parts[0], "grad_scaler", None) if self._config.precision.compute == "fp16" else None

    def close(self) -> None:
        """Drop the model and Megatron-Core's groups and buffers."""
        for chunk in self._chunks:
            rope = getattr(_bare(chunk), "rotary_pos_emb", None)
            if rope is not None:
                type(rope).forward.cache_clear()
        self._chunks, self._parts, self._bands = [], [], {}
        del self._optimizer, self._settings, self._run
        parallel_state.destroy_model_parallel()


def _initialize_parallel_state(config: RunConfig) -> None:
    """Create Megatron-Core's groups, ranks in our order. Collective over the world."""
    parallel = config.parallel
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.chunks if parallel.chunks > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        distributed_timeout_minutes=math.ceil(config.launcher.timeout_seconds / 60),
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )


def _has_transformer_engine(config: RunConfig) -> bool:
    """Return whether layers are to be Transformer Engine's."""
    wanted = config.engine.transformer_engine == "auto"
    return wanted and importlib.util.find_spec("transformer_engine") is not None


def _wrap(config: RunConfig, settings: Any, models: list[nn.Module], device: torch.device) -> list[nn.Module]:
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


def _is_sharded(part: Any) -> bool:
    return isinstance(part, DistributedOptimizer)


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


def _bare(chunk: Any) -> Any:
    """Return the GPTModel inside a chunk's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
