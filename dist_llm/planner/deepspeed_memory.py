"""What DeepSpeed's ZeRO keeps of a stage; activations are the native engine's, or Megatron's in Megatron-DeepSpeed.

    c: bytes of the compute format, n: ranks that shard     weights    gradients            masters and moments
    ZeRO 1  bf16, sums in fp32 (BF16_Optimizer)             c          c + 4                12 / n
            others                                          c          c + 4 / n            12 / n
    ZeRO 2                                                  c          a bucket, 4 / n      12 / n
    ZeRO 3                                                  c / n      a bucket, 4 / n      12 / n

In fp32 the weights are their own masters. Rajbhandari et al. 2020; the Megatron-DeepSpeed of BLOOM is of this kind.
"""

from __future__ import annotations

from dist_llm.accounting.held import stage_units
from dist_llm.accounting.memory import FORMAT_BYTES, Place, place_of
from dist_llm.accounting.peaks import gathered_bytes
from dist_llm.accounting.schedules import Pipe
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.run import RunConfig
from dist_llm.planner.components import Components
from dist_llm.planner.megatron_memory import MegatronMemory
from dist_llm.planner.stage_kind import StageKind, plan_of


def deepspeed_state(config: RunConfig, place: Place, stage: StagePlan) -> Components:
    """Return the state of a stage on a rank."""
    model, parallel = config.model, config.parallel
    c = FORMAT_BYTES[config.precision.compute]
    tensors = [tensor for unit in stage_units(model, parallel, stage) for tensor in unit]
    whole = sum(tensor.numel for tensor in tensors)
    shard = sum(place.shard_numel(tensor) for tensor in tensors)
    bucket = min(parallel.bucket_mib << 20, 4 * whole)
    kept = parallel.offload == "none"
    if parallel.zero == 1:
        gradients = whole * (c + 4) if config.precision.compute == "bf16" else whole * c + 4 * shard
    else:
        gradients = 4 * shard
    sharded = parallel.zero == 3
    return Components(
        parameters=(shard if sharded else whole) * c * (parallel.offload != "parameters"),
        gathered=gathered_bytes(model, parallel, config.precision, place, stage) if sharded else 0,
        gradients=gradients * (kept or parallel.zero == 1),
        optimizer=shard * (12 if c < 4 else 8) * kept,
        communication=3 * bucket,
    )


class MegatronDeepspeedMemory(MegatronMemory):
    """Megatron-DeepSpeed's memory under one config, on `data` data ranks: Megatron's layers, DeepSpeed's state."""

    def __init__(self, config: RunConfig, pipe: Pipe, data: int) -> None:
        super().__init__(config, pipe, data)
        self._place = place_of(config.parallel, data, 0, 0)
        self._states: dict[StageKind, Components] = {}

    def _stage(self, kind: StageKind, flying: int) -> Components:
        if kind not in self._states:
            self._states[kind] = deepspeed_state(self._config, self._place, plan_of(self._config.model, kind))
        state, layers = self._states[kind], super()._stage(kind, flying)
        return state.having(
            activations=layers.activations, working=layers.working, logits=layers.logits, buffers=layers.buffers
        )
