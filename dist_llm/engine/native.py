"""The native engine: our model, Megatron's split, FSDP2's ZeRO, torch's pipeline schedules. It documents the others.

A step: zero grad -> forward_backward -> finish gradients -> totals (one all-reduce) -> clip -> AdamW -> schedule.
Gradients are of (sum of token losses) * `loss_unit`: the loss scale over the tokens of a microbatch, so that those of
fp16 are neither lost in a large batch nor too large in a small one. The true mean over counted tokens, the loss scale
and the clip coefficient are one divisor inside the optimizer, so no pass over the gradients is spent on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dist_llm.accounting.params import padded_vocab
from dist_llm.accounting.stages import plan_stages
from dist_llm.config.run import RunConfig
from dist_llm.engine.kernels import kernels_for
from dist_llm.engine.loss_scale import LossScale
from dist_llm.engine.model import splittable
from dist_llm.engine.recipe import facts_of, formats_of, local_batch, restore_facts, update_rules
from dist_llm.engine.routing import Routing
from dist_llm.engine.totals import Totals, totals_of
from dist_llm.ops.context_share import ContextShare
from dist_llm.ops.registry import Kernels
from dist_llm.optim.adamw import AdamW
from dist_llm.optim.host_adamw import HostAdamW
from dist_llm.optim.schedule import learning_rate
from dist_llm.parallel.apply import SplitStage, SplittableModel, apply_layout
from dist_llm.parallel.cross_entropy import cross_entropy_sum
from dist_llm.parallel.grad_norm import primary_square_sum
from dist_llm.parallel.pipeline import Accumulation, Microbatching, Runner, Scheduled, StageTensors
from dist_llm.parallel.shards import LocalShard
from dist_llm.parallel.zero import reduce_in_buckets, storage_device
from dist_llm.runtime.mesh import Mesh
from dist_llm.types import IGNORE_INDEX, Batch, DataSlice, LossSum, StepResult, TensorShard, TrainState


class NativeEngine:
    """One optimizer step on one global batch over (pp, dp, cp, tp) with ZeRO.

    `observe` is called with the phase of a step: last_forward, before_update, after_update (memory is counted there).
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, model: SplittableModel | None = None, kernels: Kernels | None = None
    ) -> None:
        self._config, self._mesh = config, mesh
        self.observe: Callable[[str], None] = lambda phase: None
        self._formats = formats_of(config.precision)
        self._scale = LossScale.build(config.precision)
        self._microbatch_tokens = config.data.microbatch * config.data.seq_len
        self.data_slice = DataSlice(mesh.dp.index, mesh.dp.size)
        self._context = ContextShare(mesh.cp.index, mesh.cp.size)
        self._kernels = kernels or kernels_for(config, mesh.device)
        model = model or splittable(config.model, config.run.seed, self._kernels)
        stages = plan_stages(config.model, config.parallel.num_stages)
        self.stages = apply_layout(model, stages, config.parallel, self._formats, mesh)
        self.shards: list[LocalShard] = [shard for stage in self.stages for shard in stage.shards]
        self._tied = [shard for shard in self.shards if model.tied and shard.name == model.tied[0]]
        rules = update_rules(config, self.shards)
        kind = HostAdamW if config.parallel.offload == "optimizer" else AdamW
        self.optimizer = kind([shard.tensor for shard in self.shards], rules.decays, rules.rates, rules.optimizer)
        self._runner = self._build_runner(self.stages)
        self._routing = Routing([stage.part.model for stage in self.stages], config.model.moe, mesh)
        self._step = 0

    @property
    def loss_unit(self) -> float:
        """The factor on each token's loss before the backward; gradients / (unit * counted tokens) are the mean's."""
        return self._scale.value / self._microbatch_tokens

    def loss(
        self, logits: Float[Tensor, "batch seq columns"], targets: Int64[Tensor, "batch seq"]
    ) -> Float[Tensor, ""]:
        """Return the sum of token losses, in the unit of a backward. Issues two all-reduces over tp."""
        vocab_size, backend = self._config.model.vocab_size, self._kernels.cross_entropy
        return cross_entropy_sum(logits, targets, vocab_size, self._mesh.tp, backend) * self.loss_unit

    def _build_runner(self, stages: list[SplitStage]) -> Runner:
        data, parallel = self._config.data, self._config.parallel
        if data.global_batch % (self._mesh.dp.size * data.microbatch):
            raise ValueError("the global batch must be whole microbatches on each data rank")
        if parallel.expert > 1 and not self._config.model.num_expert_layers:
            raise ValueError("expert ranks need experts")
        if self._mesh.pp.size == 1 and len(stages) > 1:
            raise ValueError("one pipeline rank runs one stage")
        local = data.global_batch // self._mesh.dp.size
        cut = Microbatching(data.microbatch, local // data.microbatch, lambda: self.observe("last_forward"))
        if self._mesh.pp.size == 1:
            return Accumulation(stages[0].part, self.loss, cut, parallel.zero)
        share = data.seq_len // self._mesh.cp.size
        length = share // self._mesh.tp.size if parallel.sequence else share
        shape = (cut.size, length, self._config.model.hidden_size)
        tp = self._mesh.tp.size
        num_logits = padded_vocab(self._config.model.vocab_size, tp) // tp
        crossing = StageTensors(shape, self._formats.compute, (cut.size, share), num_logits, self._mesh.device)
        parts = [stage.part for stage in stages]
        return Scheduled(parts, crossing, self.loss, cut, parallel.zero, parallel.schedule, self._mesh.pp)

    def train_step(self, batch: Batch) -> StepResult:
        """Update the weights by one global batch; `batch` is this rank's share of it.

        Issues what the layout needs (tp, pp, cp, ep and zero axes), then one all-reduce of few numbers over the world.
        A step whose gradient is not finite changes nothing, on every rank alike. The host waits for the device at the
        end alone, unless rows of experts are counted or the update is the host's.
        """
        for shard in self.shards:
            shard.parameter.grad = None
        self._routing.begin(self.loss_unit)
        batch = local_batch(batch, self._context, self._mesh.device)
        loss = self._runner.forward_backward(batch)
        self.finish_gradients()
        self._routing.gather()
        self.observe("before_update")
        stored = storage_device(self._mesh, self._config.parallel.offload)
        norm_part = primary_square_sum(self.shards, stored).to(self._mesh.device)
        totals = self._totals(loss, batch, norm_part, self._routing.sums(self._mesh.device))
        lr = learning_rate(self._step, self._config.optimizer.lr, self._config.schedule, self._config.run.steps)
        self.optimizer.step([shard.gradient() for shard in self.shards], lr, totals.divisor, totals.skip)
        self._routing.move_biases(totals.skip)
        self.observe("after_update")
        found = totals.read()
        self.optimizer.num_updates -= found.skipped
        self._scale.update(not found.skipped, dynamic=self._formats.compute == torch.float16)
        self._step += 1
        router = self._routing.figures(found.others, found.tokens)
        return StepResult(found.loss, found.grad_norm, lr, found.tokens, skipped=found.skipped, figures=router)

    def eval_step(self, batch: Batch) -> LossSum:
        """Return the loss sum of one global batch. Issues the forward's collectives and one over the world."""
        batch = local_batch(batch, self._context, self._mesh.device)
        for stage in self.stages:
            stage.part.model.eval()
        try:
            loss = self._runner.forward(batch)
        finally:
            for stage in self.stages:
                stage.part.model.train()
        nothing = torch.zeros(1, dtype=torch.float64, device=self._mesh.device)
        totals = self._totals(loss, batch, nothing[0], nothing[:0]).read()
        return LossSum(totals.loss * totals.tokens, totals.tokens)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Complete what no backward did: what is left of replicas (zero), partial sums (tp), tied copies (ends).

        Issues one all-reduce a bucket over tp (partial gradients), over ends, unless both copies are here, under a
        schedule in a V; over zero what a last backward has not sent (without FSDP).
        """
        mesh, bucket = self._mesh, self._config.parallel.bucket_mib << 20
        at = mesh.device
        for stage in self.stages:
            stage.part.replicas.finish()
        if mesh.tp.size > 1:
            reduce_in_buckets(self._gradients(s for s in self.shards if s.partial), mesh.tp, bucket, at)
        if mesh.ends is not None:
            reduce_in_buckets(self._gradients(self._tied), mesh.ends, bucket, at)
        elif len(self._tied) == 2:
            first, last = self._gradients(self._tied)
            last.copy_(first.add_(last))

    @staticmethod
    def _gradients(shards: Iterable[LocalShard]) -> list[Tensor]:
        grads = [shard.gradient() for shard in shards]
        return [grad for grad in grads if grad is not None]

    def _totals(
        self,
        loss: Float[Tensor, ""],
        batch: Batch,
        square_sum: Float64[Tensor, ""],
        more: Float64[Tensor, " sums"],
    ) -> Totals:
        """Sum loss, counted tokens, squared norm and `more` over the world. One all-reduce of float64."""
        counts = self._mesh.tp.index == 0 and any(stage.part.index == stage.part.count - 1 for stage in self.stages)
        tokens = (batch.targets != IGNORE_INDEX).sum() if counts else torch.zeros((), device=self._mesh.device)
        first = torch.stack([(loss if counts else loss * 0).double(), tokens.double(), square_sum])
        local = torch.cat((first, more))
        dist.all_reduce(local, group=self._mesh.world.group)
        return totals_of(local, self.loss_unit, self._config.optimizer.clip_norm)

    def state(self) -> TrainState:
        """Return model and optimizer rectangles by logical name, and the facts that are not tensors."""
        tensors: list[TensorShard] = []
        for shard, slot in zip(self.shards, self.optimizer.slots, strict=True):
            parts = {"model": shard.tensor, "optimizer.exp_avg": slot.exp_avg, "optimizer.exp_avg_sq": slot.exp_avg_sq}
            for kind, tensor in parts.items():
                view = shard.inside(tensor)
                tensors.append(TensorShard(f"{kind}.{shard.name}", shard.shape, shard.offsets, view, shard.primary))
        tensors.extend(self._routing.state())
        updates = self.optimizer.num_updates
        facts = facts_of(self._step, updates, self._config.precision.compute, self._scale)
        return TrainState(tuple(tensors), facts)

    def restore(self, facts: dict[str, object]) -> None:
        """Take over step and update count of a checkpoint whose tensors are in place, and its loss scale where both
        sides use one."""
        compute = self._config.precision.compute
        self._step, self.optimizer.num_updates = restore_facts(facts, compute, self._scale)
        self.optimizer.take_weights()

    def close(self) -> None:
        """Drop the model so that its memory can be used again."""
        self.stages, self.shards, self._tied = [], [], []
        del self._runner, self.optimizer
