"""A plan as the config of a run: everything but its layout, which is chosen after, by weighing what fits."""

from __future__ import annotations

from typing import Any

from dist_llm.accounting.params import num_parameters
from dist_llm.config.decode import decode
from dist_llm.config.inputs import DataConfig
from dist_llm.config.model import ModelConfig
from dist_llm.config.request import PlanRequest
from dist_llm.config.run import RunConfig
from dist_llm.planner.batch_laws import Recommendation

WARMUP_SHARE, MOST_WARMUP = 0.01, 2000
"""Warm-up is a hundredth of the steps, at most 2000 (Touvron et al. 2023), at least ten but no more than a tenth."""
HIGHEST_RATE = 0.01
"""Power laws of the learning rate were fitted to models of tens of millions of parameters and more; below, they rise
beyond what trains."""


def warmup_steps(steps: int) -> int:
    """Return the steps of warm-up of a run."""
    return min(max(1, steps // 10), max(10, min(MOST_WARMUP, round(WARMUP_SHARE * steps))))


def run_name(model: ModelConfig, tokens: int) -> str:
    """Return a name that tells plans apart: family, parameters and tokens, as in llama-9.57B-174B."""
    return f"{model.family}-{_short(num_parameters(model))}-{_short(tokens)}"


def _short(number: float) -> str:
    # 999.7 million are a billion in three digits.
    unit = max((unit for unit in (1, 1e3, 1e6, 1e9, 1e12) if 0.9995 * unit <= number), default=1)
    digits = f"{number / unit:.3g}" if number < 999.5 * unit else f"{number / unit:.0f}"
    return digits + {1: "", 1e3: "K", 1e6: "M", 1e9: "B", 1e12: "T"}[unit]


def draft_config(
    request: PlanRequest,
    model: ModelConfig,
    batch: Recommendation,
    sizes: tuple[int, int, int],
    machines: tuple[int, int],
) -> RunConfig:
    """Return the run of a model, not yet split. sizes: sequences, their length, steps; machines: hosts, each.

    Optimizer and schedule are those of Llama 2 (Touvron et al. 2023), learning rate and batch those of a power law.
    """
    sequences, seq_len, steps = sizes
    nodes, each = machines
    on_cpu = request.cluster.device == "cpu"
    tree: dict[str, Any] = {
        "run": {"name": run_name(model, steps * sequences * seq_len), "steps": steps, "deterministic": on_cpu},
        "device": "cpu" if on_cpu else "cuda",
        "model": model.model_dump(),
        "parallel": {},
        "engine": {"name": request.engine},
        "optimizer": {"lr": float(f"{min(HIGHEST_RATE, batch.learning_rate):.3g}")},
        "schedule": {"name": "cosine", "warmup_steps": warmup_steps(steps)},
        "precision": {"name": request.precision or ("fp32" if on_cpu else "bf16")},
        "data": {
            "path": request.data.path,
            "seq_len": seq_len,
            "global_batch": sequences,
            "microbatch": 1,
            "max_corpus_mib": DataConfig.model_fields["max_corpus_mib"].default,
        },
        "tokenizer": {},
        "checkpoint": {},
        "telemetry": {},
        "launcher": {"name": launcher_of(request, nodes), "nproc": each, "nodes": nodes},
        "cluster": {**request.cluster.model_dump(), **({} if request.engine == "megatron" else {"practice": "native"})},
    }
    return decode(tree)


def launcher_of(request: PlanRequest, nodes: int) -> str:
    """Return what starts the ranks: as asked, else this machine on one node and SLURM on more."""
    return request.launcher or ("local" if nodes == 1 else "slurm")
