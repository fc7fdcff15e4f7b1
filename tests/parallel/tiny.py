"""A transformer that trains in milliseconds, its random batches, and jobs that the pool of gloo ranks runs on it."""

from __future__ import annotations

import math
from typing import Any

import torch

from dist_llm.config.run import RunConfig
from dist_llm.engine.native import NativeEngine
from dist_llm.runtime.mesh import build_mesh
from dist_llm.types import Batch, DataSlice

LLAMA: dict[str, object] = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 101,
    "max_seq_len": 16,
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": True,
}
GPT2: dict[str, object] = {
    **LLAMA,
    "family": "gpt2",
    "num_kv_heads": None,
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "bias": True,
    "dropout": 0.1,
}
MOE: dict[str, object] = {
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": 24,
        "num_shared": 1,
        "num_dense_layers": 1,
        "balance_loss": 0.05,
        "z_loss": 0.01,
        "bias_rate": 0.01,
    }
}
SIGMOID_MOE: dict[str, object] = {
    "moe": {"num_experts": 8, "top_k": 3, "score": "sigmoid", "bias_rate": 0.05, "scale": 2.0}
}
Curve = list[tuple[float, float]]
"""(loss, gradient norm) of every step."""
PEAKS = {"fp32": 1.0, "bf16": 1.0, "fp16": 1.0, "fp64": 1.0}


def tiny_config(
    parallel: dict[str, object] | None = None,
    model: dict[str, object] | None = None,
    data: dict[str, object] | None = None,
    **sections: Any,
) -> RunConfig:
    """Return a run of 8 sequences of 16 tokens a step."""
    return RunConfig.model_validate(
        {
            "run": {"steps": 6, "seed": 1},
            "model": {**LLAMA, **(model or {})},
            "parallel": parallel or {},
            "data": {"seq_len": 16, "global_batch": 8, "microbatch": 1, **(data or {})},
            "engine": {},
            "optimizer": {"lr": 1e-2},
            "schedule": {"name": "constant"},
            "precision": {},
            "tokenizer": {},
            "checkpoint": {},
            "telemetry": {},
            "launcher": {},
            "cluster": {
                "name": "test",
                "device": "cpu",
                "devices_per_node": None,
                "peak_tflops": PEAKS,
                "memory_gib": 1,
                "source": "test",
            },
            **sections,
        }
    )


def random_batch(config: RunConfig, share: DataSlice, step: int) -> Batch:
    """Return this share of the random global batch of a step."""
    data = config.data
    generator = torch.Generator().manual_seed(step)
    shape = (data.global_batch, data.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    rows = slice(share.index * data.global_batch // share.count, (share.index + 1) * data.global_batch // share.count)
    samples = torch.arange(step * data.global_batch, (step + 1) * data.global_batch)[rows]
    documents = None
    if data.document_mask:
        documents = (tokens[rows, :-1] < 10).long().cumsum(1)
    return Batch(step, tokens[rows, :-1], tokens[rows, 1:], samples, documents)


def build(config: RunConfig) -> NativeEngine:
    """Return the engine over the current process group."""
    return NativeEngine(config, build_mesh(config.parallel, torch.device("cpu")))


def curve(config: RunConfig, steps: int = 5) -> Curve:
    """Train and return (loss, gradient norm) of each step."""
    engine = build(config)
    results = [engine.train_step(random_batch(config, engine.data_slice, step)) for step in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def largest_gap(ours: Curve, theirs: Curve) -> float:
    """Return the largest relative difference of loss or gradient norm; infinite where one is not a number."""
    gaps = [abs(a - b) / abs(b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return max(gap if math.isfinite(gap) else math.inf for gap in gaps)
