"""DeepSpeed's ZeRO, offload and Adam on our model and tensor-parallel layers, seen as the other engines are.

A step: microbatches (DeepSpeed adds gradients up and reduces them) -> totals -> its norm, clipping, Adam -> schedule.
Losses are in the unit of the native engine. What turns that into the mean's gradient is known when the last forward is
done, and is handed to DeepSpeed as its loss scale, by which it divides before it clips; the scale of fp16 is in it.
A loss that is not finite is made to reach every gradient, so that DeepSpeed skips the step as it does one of theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_llm.accounting.stages import plan_stages
from dist_llm.config.run import RunConfig
from dist_llm.engine import deepspeed_library as library
from dist_llm.engine.deepspeed_settings import settings_of
from dist_llm.engine.deepspeed_state import FlatState
from dist_llm.engine.kernels import kernels_for
from dist_llm.engine.loss_scale import LossScale
from dist_llm.engine.model import splittable
from dist_llm.engine.recipe import facts_of, formats_of, local_batch, restore_facts, update_rules
from dist_llm.engine.routing import Routing
from dist_llm.ops.context_share import ContextShare
from dist_llm.optim.schedule import learning_rate
from dist_llm.parallel.apply import apply_layout
from dist_llm.parallel.cross_entropy import cross_entropy_sum
from dist_llm.parallel.pipeline import microbatches
from dist_llm.parallel.shards import LocalShard
from dist_llm.runtime.mesh import Axis, Mesh
from dist_llm.types import IGNORE_INDEX, Batch, DataSlice, LossSum, StepResult, TrainState


@dataclass(frozen=True)
class Totals:
    """What the ranks summed after the last forward: the sum of losses in the unit of a backward, counted tokens."""

    loss: float
    tokens: int


class DeepSpeedEngine:
    """One optimizer step on one global batch over (dp, cp, tp) with DeepSpeed's ZeRO."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        deepspeed = library.import_deepspeed(mesh.device)
        if config.engine.offload_to == "nvme":
            library.require_async_io(mesh)
        self._scale = LossScale.build(config.precision)
        self.data_slice = DataSlice(mesh.dp.index, mesh.dp.size)
        self._context = ContextShare(mesh.cp.index, mesh.cp.size)
        formats = formats_of(config.precision)
        stages = plan_stages(config.model, 1)
        self._kernels = kernels_for(config, mesh.device)
        model = splittable(config.model, config.run.seed, self._kernels)
        (stage,) = apply_layout(model, stages, config.parallel, formats, mesh, zero=False)
        self._model = stage.part.model
        _mark_parts(stage.shards, mesh.tp)
        self._adam = self._build_adam(stage.shards)
        settings = settings_of(config, mesh, [shard.tensor for shard in stage.shards])
        self._session = library.Session(deepspeed, mesh, self._model, self._adam, settings)
        self._engine = self._session.engine
        self._zero: Any = self._engine.optimizer
        self._state = FlatState(self._zero, self._adam, stage.shards, mesh)
        self._routing = Routing([self._model], config.model.moe, mesh)
        self._step, self._updates = 0, 0

    def _build_adam(self, shards: tuple[LocalShard, ...]) -> torch.optim.Optimizer:
        """Return the optimizer of groups of weights that are updated alike."""
        rules = update_rules(self._config, shards)
        groups: dict[tuple[bool, float], list[Tensor]] = {}
        for shard, decays, rate in zip(shards, rules.decays, rules.rates, strict=True):
            groups.setdefault((decays, rate), []).append(shard.parameter)
        decay = self._config.optimizer.weight_decay
        weights = [
            {"params": parameters, "rate": rate, "weight_decay": decay / rate if decays else 0.0}
            for (decays, rate), parameters in groups.items()
        ]
        return library.build_adam(self._mesh, weights, rules.optimizer, self._config.parallel.offload != "none")

    @property
    def loss_unit(self) -> float:
        """The factor on each token's loss before the backward; gradients / (unit * counted tokens) are the mean's."""
        return self._scale.value / (self._config.data.microbatch * self._config.data.seq_len)

    def train_step(self, batch: Batch) -> StepResult:
        """Update the weights by one global batch; `batch` is this rank's share of it.

        Issues what the layout needs (tp, cp), DeepSpeed's collectives over zero and tp, one all-reduce of two numbers
        over the world, and with experts one more. A step whose loss or gradient is not finite changes nothing.
        """
        self._state.forget_copies()
        self._routing.begin(self.loss_unit)
        totals = self._forward_backward(local_batch(batch, self._context, self._mesh.device))
        self._routing.gather()
        figures = self._routing.figures(self._sum(self._routing.sums(self._mesh.device)), totals.tokens)
        unit = totals.tokens * self.loss_unit if totals.tokens else 1.0
        lr = learning_rate(self._step, self._config.optimizer.lr, self._config.schedule, self._config.run.steps)
        for group in self._adam.param_groups:
            group["lr"] = lr * group["rate"]
        norm = self._update(unit)
        finite = bool(self._engine.was_step_applied())
        if finite:
            self._routing.move_biases()
            self._updates += 1
        self._scale.update(finite, dynamic=self._config.precision.compute == "fp16")
        self._step += 1
        return StepResult(totals.loss / unit, norm, lr, totals.tokens, skipped=not finite, figures=figures)

    def _forward_backward(self, batch: Batch) -> Totals:
        """Accumulate gradients over the microbatches, and let DeepSpeed reduce them."""
        size = self._config.data.microbatch
        count = batch.tokens.shape[0] // size
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        totals = Totals(0.0, 0)
        self._set_divisor(1.0)
        for index, (tokens, targets, extras) in enumerate(microbatches(batch, size)):
            loss = self._loss(self._engine(tokens, **extras), targets)
            loss_sum += loss.detach()
            if index == count - 1:
                totals = self._totals(loss_sum, batch.targets)
                loss = loss if math.isfinite(totals.loss) else loss * math.nan
            self._engine.backward(loss, scale_wrt_gas=False)
            if index < count - 1:
                self._engine.step()
        return totals

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of token losses, in the unit of a backward. Issues two all-reduces over tp."""
        vocab_size, backend = self._config.model.vocab_size, self._kernels.cross_entropy
        return cross_entropy_sum(logits, targets, vocab_size, self._mesh.tp, backend) * self.loss_unit

    def _totals(self, loss: Tensor, targets: Tensor) -> Totals:
        """Sum loss and counted tokens over the world. One all-reduce of float64."""
        counts = self._mesh.tp.index == 0
        tokens = (targets != IGNORE_INDEX).sum().double()
        loss_sum, counted = self._sum(torch.stack((loss, tokens)) * counts)
        return Totals(loss_sum, int(counted))

    def _sum(self, values: Tensor) -> list[float]:
        """Return float64 values summed over the world, by one all-reduce unless there are none."""
        if values.numel():
            dist.all_reduce(values, group=self._mesh.world.group)
        sums: list[float] = values.tolist()
        return sums

    def _update(self, unit: float) -> float:
        """Let DeepSpeed clip and update; return the norm of the mean's gradient. Its collectives over zero and tp.

        Its gradients are the mean over zero, whose ranks hold parts of a sum.
        """
        divisor = unit / self._mesh.zero.size
        self._set_divisor(divisor)
        # For bf16 under ZeRO 1 it has an optimizer of its own, which knows no loss scale.
        for gradients in getattr(self._zero, "fp32_groups_gradients_flat", ()):
            gradients.div_(divisor)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _set_divisor(self, divisor: float) -> None:
        """Set what DeepSpeed multiplies a loss with before its backward, and divides the gradients by in its step."""
        self._zero.custom_loss_scaler, self._zero.external_loss_scale = True, divisor

    def eval_step(self, batch: Batch) -> LossSum:
        """Return the loss sum of one global batch. Issues the forward's collectives and one over the world."""
        batch = local_batch(batch, self._context, self._mesh.device)
        loss = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        self._model.eval()
        try:
            with torch.no_grad():
                for tokens, targets, extras in microbatches(batch, self._config.data.microbatch):
                    loss += self._loss(self._engine(tokens, **extras), targets)
        finally:
            self._model.train()
        totals = self._totals(loss, batch.targets)
        return LossSum(totals.loss / self.loss_unit, totals.tokens)

    def state(self) -> TrainState:
        """Return model and optimizer rectangles by logical name, and the facts that are not tensors."""
        tensors = [*self._state.shards(), *self._routing.state()]
        return TrainState(
            tuple(tensors), facts_of(self._step, self._updates, self._config.precision.compute, self._scale)
        )

    def restore(self, facts: dict[str, object]) -> None:
        """Take over a checkpoint whose tensors are in place. Collectives: all-gathers of the weights over zero."""
        self._step, self._updates = restore_facts(facts, self._config.precision.compute, self._scale)
        self._state.restore(self._updates)

    def close(self) -> None:
        """Drop the model, and what DeepSpeed's modules remember of it and of the process groups."""
        self._session.close()
        del self._session, self._state, self._engine, self._zero, self._adam, self._model, self._routing


def _mark_parts(shards: tuple[LocalShard, ...], tp: Axis) -> None:
    """Tell DeepSpeed's gradient norm which weights tp ranks hold parts of, and complete partial gradients before it.

    In every backward each weight whose gradient is partial issues one all-reduce over tp, in fp32.
    """

    def complete(gradient: Tensor) -> Tensor:
        whole = gradient.float()
        dist.all_reduce(whole, group=tp.group)
        return whole.to(gradient.dtype)

    for shard in shards:
        shard.parameter.tensor_model_parallel = shard.split  # type: ignore[attr-defined]
        if shard.partial and tp.size > 1:
            shard.parameter.register_hook(complete)  # type: ignore[no-untyped-call]
