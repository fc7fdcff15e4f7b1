"""Our config in DeepSpeed's words: the JSON that its users write by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_llm.config.run import RunConfig
from dist_llm.runtime.mesh import Mesh

_NEVER = 2**31
"""A number of steps that is not reached."""


def settings_of(config: RunConfig, mesh: Mesh, weights: Sequence[Tensor]) -> dict[str, Any]:
    """Return DeepSpeed's settings for a rank that holds `weights` (its tp share).

    Reductions and gradient sums are in fp32 under every precision, as in the native engine.
    """
    data, compute = config.data, config.precision.compute
    return {
        "train_micro_batch_size_per_gpu": data.microbatch,
        "gradient_accumulation_steps": data.global_batch // mesh.dp.size // data.microbatch,
        "gradient_clipping": config.optimizer.clip_norm,
        "steps_per_print": _NEVER,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": compute == "bf16", "check_grad_overflow": True},
        # The engine sets the scale of each step itself.
        "fp16": {"enabled": compute == "fp16", "loss_scale": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config, mesh, weights),
    }


def _zero(config: RunConfig, mesh: Mesh, weights: Sequence[Tensor]) -> dict[str, Any]:
    parallel = config.parallel
    total = sum(weight.numel() for weight in weights)
    # In elements of fp32, even; a buffer of that size is allocated, so no larger than the model.
    bucket = 2 * max(1, min(parallel.bucket_mib << 18, total + 1) // 2)
    zero: dict[str, Any] = {
        "stage": parallel.zero,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # Its linear would replace torch's for all of the process.
        "memory_efficient_linear": False,
    }
    if parallel.zero == 3:
        # Vectors stay whole: gathering one costs more than it saves.
        zero["stage3_param_persistence_threshold"] = max((w.numel() for w in weights if w.dim() == 1), default=0)
        zero["stage3_prefetch_bucket_size"] = bucket
    if parallel.offload != "none":
        zero["offload_optimizer"] = _offload(config, mesh)
    if parallel.offload == "parameters":
        zero["offload_param"] = _offload(config, mesh)
        if config.engine.offload_to == "nvme":
            # By default all of a rank's weights up to a thousand million would stay in host memory.
            largest = max(weight.numel() for weight in weights)
            zero["offload_param"] |= {"max_in_cpu": 0, "buffer_size": largest}
    return zero


def _offload(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Return where what is offloaded goes; pages are pinned where there is a device to copy to."""
    engine = config.engine
    place: dict[str, Any] = {"device": engine.offload_to, "pin_memory": mesh.device.type == "cuda"}
    if engine.offload_to == "nvme":
        # A folder for each run: files are named by rank alone.
        place["nvme_path"] = str(Path(engine.nvme_path or ".").expanduser() / config.run.name)
    return place
