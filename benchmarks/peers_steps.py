"""The steps that peers.py times, of ours and of plain PyTorch: one optimizer step on one global batch each.

    ours         the engine's step, as `dist-llm bench step` times it
    bare         our model, kernels, loss and optimizer in a loop of ten lines: what is missing to ours is the framework
    plain        the model of peers_model.py, torch.optim.AdamW(fused=True) and clip_grad_norm_; DDP over dp
    gemm_floor   nothing but the matrix products of the linear layers and the head, forward and backward

ours, bare and plain start from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers_model import PlainTransformer
from dist_llm.accounting.stages import plan_stages
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.engine.kernels import kernels_for
from dist_llm.engine.model import splittable
from dist_llm.engine.native import NativeEngine
from dist_llm.optim.adamw import AdamW
from dist_llm.parallel.cross_entropy import cross_entropy_sum
from dist_llm.parallel.shards import LocalShard
from dist_llm.runtime.mesh import Mesh
from dist_llm.types import Batch, DataSlice


@dataclass(frozen=True)
class Contestant:
    """A step to time: its share of the global batch, and what trains on that and returns the loss (nan: not known).

    same_start: it began with our initial weights, so its first loss must be ours.
    """

    share: DataSlice
    step: Callable[[Batch], float]
    same_start: bool = False
    deterministic: bool = False


class CannotRunError(Exception):
    """Why a contestant is left out of a case."""


def fill(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Give every parameter of a whole model the initial value that ours has."""
    initialise = splittable(config, seed).initialise
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        kinds = {"primary": True, "partial": False, "expert": False, "split": False}
        data = parameter.detach()
        initialise(LocalShard(name, parameter, data, shape, (0,) * len(shape), shape, **kinds))


def microbatches(batch: Batch, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and targets of `size` sequences each."""
    yield from zip(batch.tokens.split(size), batch.targets.split(size), strict=True)


def update_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return the groups of an AdamW of torch: matrices decay, vectors do not."""
    chosen = list(model.parameters())
    return [
        {"params": [p for p in chosen if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in chosen if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Return torch's fused AdamW with the config's settings."""
    update = config.optimizer
    groups = update_groups(model, update.weight_decay)
    return torch.optim.AdamW(groups, lr=update.lr, betas=tuple(update.betas), eps=update.eps, fused=True)


def require_only_data(config: RunConfig, who: str) -> None:
    """Raise CannotRunError where ranks share a model out."""
    parallel = config.parallel
    if max(parallel.tensor, parallel.pipeline, parallel.context) > 1:
        raise CannotRunError(f"{who} does not split this model over tp or pp")


def require_one_process(mesh: Mesh, who: str) -> None:
    """Raise CannotRunError where there are ranks."""
    if mesh.world.size > 1:
        raise CannotRunError(f"{who} is timed in one process only")


def build_ours(config: RunConfig, mesh: Mesh) -> Contestant:
    """Return the native engine's step."""
    engine = NativeEngine(config, mesh)
    return Contestant(engine.data_slice, lambda batch: engine.train_step(batch).loss, True, config.run.deterministic)


def build_bare(config: RunConfig, mesh: Mesh) -> Contestant:
    """Return a loop over our model, loss and optimizer."""
    require_one_process(mesh, "the bare loop")
    kernels = kernels_for(config, mesh.device)
    family = splittable(config.model, config.run.seed, kernels)
    model = family.build(plan_stages(config.model, 1)[0])
    family.allocate(model, mesh.device, mesh.device)
    family.tie(model)
    fill(model, config.model, config.run.seed)
    weights = [*model.parameters()]
    update = config.optimizer
    datas = [weight.detach() for weight in weights]
    optimizer = AdamW(datas, [weight.dim() >= 2 for weight in weights], [1.0] * len(weights), update)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy_sum(model(tokens), targets, config.model.vocab_size, mesh.tp, kernels.cross_entropy)

    def step(batch: Batch) -> float:
        for weight in weights:
            weight.grad = None
        total = torch.zeros(())
        for tokens, targets in microbatches(batch, config.data.microbatch):
            loss = loss_of(tokens, targets) / batch.tokens.numel()
            loss.backward()
            total += loss.detach()
        grads = [weight.grad for weight in weights]
        norm = torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])
        optimizer.step(grads, update.lr, (norm / update.clip_norm).clamp(min=1.0))
        return float(total)

    return Contestant(DataSlice(0, 1), step, True, config.run.deterministic)


def build_plain(config: RunConfig, mesh: Mesh) -> Contestant:
    """Return plain PyTorch's step, with DistributedDataParallel over dp."""
    require_only_data(config, "plain PyTorch")
    whole = PlainTransformer(config.model)
    fill(whole, config.model, config.run.seed)
    model = whole if mesh.dp.size == 1 else DistributedDataParallel(whole, process_group=mesh.dp.group)
    optimizer = build_adamw(whole, config)
    size, clip = config.data.microbatch, config.optimizer.clip_norm

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        count = batch.tokens.shape[0] // size
        total = torch.zeros(())
        for tokens, targets in microbatches(batch, size):
            loss = model(tokens, targets) / count
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(whole.parameters(), clip)
        optimizer.step()
        return float(total)

    return Contestant(DataSlice(mesh.dp.index, mesh.dp.size), step, mesh.dp.size == 1)


def build_gemm_floor(config: RunConfig, mesh: Mesh) -> Contestant:
    """Return the matrix products of a step: of each linear x W^T, dy W and dy^T x, into memory that is there."""
    require_one_process(mesh, "the floor of matrix products")
    if config.data.microbatch != config.data.global_batch:
        raise CannotRunError("the floor of matrix products is that of a step of one microbatch")
    rows = config.data.microbatch * config.data.seq_len
    model = PlainTransformer(config.model)
    fill(model, config.model, config.run.seed)
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    widths = {width for weight in weights for width in weight.shape}
    inputs = {width: torch.randn(rows, width) for width in widths}
    grads = {width: torch.randn(rows, width) for width in widths}
    outs = {width: torch.empty(rows, width) for width in widths}
    updates = {tuple(weight.shape): torch.empty_like(weight) for weight in weights}

    def step(batch: Batch) -> float:
        for weight in weights:
            high, wide = weight.shape
            torch.mm(inputs[wide], weight.t(), out=outs[high])
        for weight in reversed(weights):
            high, wide = weight.shape
            torch.mm(grads[high], weight, out=outs[wide])
            torch.mm(grads[high].t(), inputs[wide], out=updates[high, wide])
        return math.nan

    return Contestant(DataSlice(0, 1), step)
