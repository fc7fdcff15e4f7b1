"""The Megatron-Core engine: its GPTModel, process groups, schedules, gradient buffers and (distributed) optimizer.

Ours are the initial weights, the loss, the learning rate and the meaning of a step, so it trains what the native engine
trains. Masters are filled, saved and loaded as rectangles of logical tensors (rectangles.py); the model follows them.
Megatron-Core keeps one layout in module globals (`parallel_state`): one such engine at a time in a process.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from dist_llm.accounting.stages import engine_stages
from dist_llm.config.run import RunConfig
from dist_llm.engine.loss_scale import LossScale
from dist_llm.engine.megatron_cpu import name_types, prepare_modules
from dist_llm.engine.megatron_fused import find_fused
from dist_llm.engine.megatron_model import build_chunks, chosen_attention
from dist_llm.engine.megatron_names import Names, is_split
from dist_llm.engine.megatron_optimizer import (
    build_optimizer,
    copy_masters,
    make_moments,
    masters,
    set_steps,
    wrap_chunks,
)
from dist_llm.engine.model import splittable
from dist_llm.engine.recipe import facts_of, local_batch, restore_facts
from dist_llm.engine.rectangles import Band, band_shards
from dist_llm.errors import EngineUnavailable
from dist_llm.ops.context_share import ContextShare
from dist_llm.optim.schedule import learning_rate
from dist_llm.parallel.cross_entropy import cross_entropy_sum
from dist_llm.parallel.pipeline import microbatches
from dist_llm.parallel.shards import LocalShard
from dist_llm.runtime.cpu_torch import staying_on_cpu
from dist_llm.runtime.mesh import Mesh
from dist_llm.runtime.variables import keep_variables
from dist_llm.types import IGNORE_INDEX, Batch, DataSlice, LossSum, StepResult, TensorShard, TrainState

Microbatch = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Tokens and targets of this rank's share of the sequences, and what else there is of them."""


class MegatronEngine:
    """One optimizer step on one global batch by Megatron-Core over (pp, dp, cp, tp)."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._context = ContextShare(mesh.cp.index, mesh.cp.size)
        self.data_slice = DataSlice(mesh.dp.index, mesh.dp.size)
        self._microbatch_tokens = config.data.microbatch * config.data.seq_len
        self._num_microbatches = config.data.global_batch // (mesh.dp.size * config.data.microbatch)
        self._scale = LossScale.build(config.precision)
        self._step, self._num_updates = 0, 0
        _initialize_parallel_state(config)
        on_cpu = mesh.device.type == "cpu"
        if on_cpu:
            prepare_modules()
        else:
            # Layers ask for its generators even where nothing is dropped.
            model_parallel_cuda_manual_seed(config.run.seed)
        # It tells Transformer Engine by variables which kernels to take.
        with self._on_device(), keep_variables() if on_cpu else contextlib.nullcontext():
            self._build()
        self._fill()

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which Megatron-Core's code runs."""
        return staying_on_cpu() if self._mesh.device.type == "cpu" else contextlib.nullcontext()

    def _build(self) -> None:
        """Build the chunks, their gradient buffers and the optimizer."""
        config, mesh = self._config, self._mesh
        stages = engine_stages("megatron", config.model, config.parallel.num_stages)
        fused = find_fused(config, mesh.device.type == "cuda")
        if config.engine.fp8 != "none" and not fused.layers:
            raise EngineUnavailable(
                f"engine.fp8={config.engine.fp8} needs CUDA, and the device here is {mesh.device.type}; use none"
            )
        self._attend = chosen_attention(config, mesh, fused)
        self._settings, models = build_chunks(config, stages, mesh, fused, self._attend)
        expert = parallel_state.get_expert_model_parallel_rank() * (
            config.model.moe.num_experts // config.parallel.expert
        )
        names = Names(config.model, mesh.tp.index, mesh.tp.size, expert)
        self._mine = [stage for stage in stages if stage.index % mesh.pp.size == mesh.pp.index]
        self._bands: dict[nn.Parameter, tuple[list[Band], bool]] = {}
        for stage, model in zip(self._mine, models, strict=True):
            for name, parameter in model.named_parameters():
                copy = name == "output_layer.weight" and config.model.tie_embeddings
                self._bands[parameter] = (names.bands(name, parameter, stage.layers), copy)
                if is_split(name):  # Megatron-Core says so of the weights that it initialises itself
                    parameter.tensor_model_parallel = True
        self._chunks: list[Any] = wrap_chunks(config, self._settings, models, mesh.device)
        for router in self._routers().values():
            router._maintain_float32_expert_bias()
            if router.local_tokens_per_expert is not None:  # counts, which Megatron-Core too casts to 16 bits
                router.local_tokens_per_expert = router.local_tokens_per_expert.float()
        if mesh.device.type != "cuda":
            name_types(self._bands)
        self._optimizer, self._parts = build_optimizer(config, self._chunks)
        self._settings.finalize_model_grads_func = self._finish_gradients
        self._settings.grad_scale_func = self._scaled
        if self._chunks[0].ddp_config.overlap_grad_reduce:
            waits = [chunk.no_sync for chunk in self._chunks]
            self._settings.no_sync_func = waits if len(waits) > 1 else waits[0]
        self._run = get_forward_backward_func()

    @torch.no_grad()
    def _fill(self) -> None:
        """Make the optimizer's state and give masters and weights their initial values."""
        make_moments(self._parts)
        initialise = splittable(self._config.model, self._config.run.seed).initialise
        for master in masters(self._parts):
            master.flat.zero_()
        for shard in self._shards("model"):
            initialise(_as_parameter(shard))
        self._take_masters()

    def _shards(self, kind: str) -> Iterator[TensorShard]:
        """Yield this rank's rectangles of the masters (`model`) or of a moment."""
        for master in masters(self._parts):
            bands, copy = self._bands[master.parameter]
            flat = master.flat if kind == "model" else master.state[kind.removeprefix("optimizer.")].view(-1)
            split = getattr(master.parameter, "tensor_model_parallel", False)
            dense = getattr(master.parameter, "allreduce", True)
            replica = self._mesh.zero.index if dense else parallel_state.get_expert_data_parallel_rank()
            first = self._config.parallel.zero == 1 or replica == 0
            primary = first and not copy and (split or self._mesh.tp.index == 0)
            yield from band_shards(kind, flat, master.start, bands, primary)

    def _routers(self) -> dict[int, Any]:
        """Return the routers of this rank by layer."""
        blocks = {
            layer: block
            for stage, chunk in zip(self._mine, self._chunks, strict=True)
            for layer, block in zip(stage.layers, _bare(chunk).decoder.layers, strict=True)
        }
        return {layer: block.mlp.router for layer, block in blocks.items() if self._config.model.has_experts(layer)}

    def _moving_biases(self) -> list[Tensor]:
        """Return the routers' biases that Megatron-Core moves as it finishes the gradients."""
        return [router.expert_bias for router in self._routers().values() if router.expert_bias is not None]

    def _biases(self) -> Iterator[TensorShard]:
        """Yield the routers' biases, which are no parameters and yet part of the model; zeros where none moves."""
        primary = self._mesh.zero.index == 0 and self._mesh.tp.index == 0
        for layer, router in self._routers().items():
            still = torch.zeros(self._config.model.moe.num_experts, device=self._mesh.device)
            bias = still if router.expert_bias is None else router.expert_bias
            yield TensorShard(f"model.layers.{layer}.mlp.router.bias", tuple(bias.shape), (0,), bias, primary)

    def _take_masters(self) -> None:
        """Make the weights those of the masters. Issues one all-gather a bucket over zero under ZeRO-1."""
        copy_masters(self._parts)
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
        biases = [(bias, bias.clone()) for bias in self._moving_biases()]
        loss, tokens = self._totals(self._forward_backward(batch, forward_only=False), batch)
        lr = learning_rate(self._step, self._config.optimizer.lr, self._config.schedule, self._config.run.steps)
        norm = math.inf if self._optimizer.prepare_grads() else float(self._optimizer.get_grad_norm())
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self._update(lr, norm)
        else:
            for bias, before in biases:
                bias.copy_(before)
        self._scale.update(finite, dynamic=self._config.precision.compute == "fp16")
        self._set_scalers()
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
        size = self._config.data.microbatch
        rows = list(microbatches(local_batch(batch, self._context, self._mesh.device), size))
        sources = [iter(rows) for _ in self._chunks]
        with self._on_device():
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

    def _forward(self, source: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        """Run a microbatch through a chunk; return its output and what makes a loss of it."""
        tokens, targets, extras = next(source)
        positions = self._context.positions(tokens.shape[1], tokens.device).expand_as(tokens)
        mask = None if self._attend is None or "documents" not in extras else self._attend.mask(extras["documents"])
        return chunk(tokens, positions, mask), partial(self._loss, targets)

    def _loss(
        self, targets: Int64[Tensor, "batch seq"], logits: Float[Tensor, "batch seq columns"]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss sum of a microbatch, the counted tokens, and the sum to report. Two all-reduces over tp."""
        total = cross_entropy_sum(logits, targets, self._config.model.vocab_size, self._mesh.tp)
        counted = (targets != IGNORE_INDEX).sum().int()
        return total, counted, {"loss": total.detach().clone()}

    def _scaled(self, loss: Tensor) -> Tensor:
        """Return a loss in the unit of a backward, the native engine's: the loss scale over a microbatch's tokens."""
        return loss * (self._scale.value / self._microbatch_tokens)

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
        tensors = (*(shard for kind in kinds for shard in self._shards(kind)), *self._biases())
        facts = facts_of(self._step, self._num_updates, self._config.precision.compute, self._scale)
        return TrainState(tensors, facts)

    def restore(self, facts: dict[str, object]) -> None:
        """Take over masters that were loaded in place, step and update count, and a loss scale where both use one."""
        self._take_masters()
        self._step, self._num_updates = restore_facts(facts, self._config.precision.compute, self._scale)
        set_steps(self._parts, self._num_updates)
        self._set_scalers()

    def _set_scalers(self) -> None:
        """Give our loss scale to Megatron-Core's scalers, of which dense weights and experts have one each under fp16.

        Left alone each would go by the gradients of its own weights.
        """
        for part in self._parts:
            scaler = getattr(part, "grad_scaler", None)
            if scaler is not None:
                scaler._scale.fill_(self._scale.value)
                scaler._growth_tracker = self._scale.good_steps

    def close(self) -> None:
        """Drop the model and Megatron-Core's groups and buffers."""
        for chunk in self._chunks:
            rope = getattr(_bare(chunk), "rotary_pos_emb", None)
            if rope is not None:
                type(rope).forward.cache_clear()
            # Its hooks hold the chunk, and experts keep graphs that hold the hooks: a cycle that Python cannot see.
            vars(chunk).clear()
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
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(config.launcher.timeout_seconds / 60),
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )


def _as_parameter(shard: TensorShard) -> LocalShard:
    """Return a rectangle of a master as a parameter of its own, for its initial values."""
    name, extent = shard.name.removeprefix("model."), tuple(shard.data.shape)
    alone = nn.Parameter(shard.data, requires_grad=False)
    kinds = {"primary": shard.primary, "partial": False, "expert": False, "split": True}
    return LocalShard(name, alone, shard.data, shard.shape, shard.offsets, extent, **kinds)


def _bare(chunk: Any) -> Any:
    """Return the GPTModel inside a chunk's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
