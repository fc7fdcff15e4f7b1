"""What every engine that trains our model takes from the config alike: formats, update rules, batches and facts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from dist_llm.config.run import RunConfig
from dist_llm.config.training import OptimizerConfig, PrecisionConfig
from dist_llm.engine.loss_scale import LossScale
from dist_llm.models.plan import plan_rate
from dist_llm.ops.context_share import ContextShare
from dist_llm.parallel.apply import Formats
from dist_llm.parallel.shards import LocalShard
from dist_llm.types import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""torch's name for each configured format."""


def formats_of(precision: PrecisionConfig) -> Formats:
    """Return torch's formats of a precision."""
    return Formats(DTYPES[precision.compute], DTYPES[precision.master])


@dataclass(frozen=True)
class UpdateRules:
    """Which weights decay, the factor on each one's learning rate, and the optimizer with its epsilon under muP."""

    decays: list[bool]
    rates: list[float]
    optimizer: OptimizerConfig


def update_rules(config: RunConfig, shards: Iterable[LocalShard]) -> UpdateRules:
    """Return how each shard is updated: matrices decay, vectors do not."""
    chosen = list(shards)
    # Under muP every gradient shrinks as the width grows; so does what is added to its root.
    eps = config.optimizer.eps / config.model.width_ratio
    return UpdateRules(
        decays=[len(shard.shape) >= 2 for shard in chosen],
        rates=[plan_rate(config.model, shard.name) for shard in chosen],
        optimizer=config.optimizer.model_copy(update={"eps": eps}),
    )


def local_batch(batch: Batch, context: ContextShare, device: torch.device) -> Batch:
    """Return this rank's share of the batch's tokens, on the device; documents stay those of all tokens."""
    return replace(
        batch,
        tokens=context.take(batch.tokens.to(device, non_blocking=True)),
        targets=context.take(batch.targets.to(device, non_blocking=True)),
        samples=batch.samples.to(device, non_blocking=True),
        documents=None if batch.documents is None else batch.documents.to(device, non_blocking=True),
    )


def facts_of(step: int, updates: int, compute: str, scale: LossScale) -> dict[str, object]:
    """Return what a checkpoint holds of an engine beside tensors."""
    return {
        "step": step,
        "optimizer_updates": updates,
        "compute": compute,
        "loss_scale": scale.value,
        "loss_scale_good_steps": scale.good_steps,
    }


def restore_facts(facts: dict[str, object], compute: str, scale: LossScale) -> tuple[int, int]:
    """Return step and number of updates of a checkpoint, and take over its loss scale where both sides use one."""
    if compute == "fp16" and facts["compute"] == "fp16":
        scale.value = float(facts["loss_scale"])  # type: ignore[arg-type]
        scale.good_steps = int(facts["loss_scale_good_steps"])  # type: ignore[call-overload]
    return int(facts["step"]), int(facts["optimizer_updates"])  # type: ignore[call-overload]
