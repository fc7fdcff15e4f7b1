"""A small legal config as plain values, and ways to change it."""

from __future__ import annotations

from typing import Any

from dist_llm.config.decode import decode
from dist_llm.config.run import RunConfig


def small_tree() -> dict[str, Any]:
    """Return a config that runs anywhere from 1 rank to 8."""
    return {
        "run": {"name": "small", "steps": 100},
        "model": {
            "family": "llama",
            "num_layers": 4,
            "hidden_size": 64,
            "num_heads": 8,
            "num_kv_heads": 4,
            "ffn_hidden_size": 128,
            "vocab_size": 512,
            "max_seq_len": 64,
            "position": "rope",
            "rope": {"theta": 10000.0},
            "norm": "rmsnorm",
            "activation": "swiglu",
            "bias": False,
            "tie_embeddings": True,
        },
        "parallel": {},
        "engine": {"name": "native"},
        "optimizer": {"betas": [0.9, 0.95]},
        "schedule": {"warmup_steps": 10},
        "precision": {},
        "data": {"seq_len": 64, "global_batch": 16, "microbatch": 2},
        "tokenizer": {},
        "checkpoint": {},
        "telemetry": {},
        "launcher": {},
        "cluster": {
            "name": "cpu",
            "device": "cpu",
            "devices_per_node": None,
            "peak_tflops": {"fp32": 0.1, "bf16": 0.1, "fp16": 0.1, "fp64": 0.05},
            "memory_gib": 4.0,
            "source": "a test",
        },
    }


def set_key(tree: dict[str, Any], key: str, value: object) -> None:
    """Set the value at a key path, making sections on the way."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def config_with(**changes: object) -> RunConfig:
    """Return the small config with changes; `parallel__tensor=2` sets parallel.tensor."""
    tree = small_tree()
    for key, value in changes.items():
        set_key(tree, key.replace("__", "."), value)
    return decode(tree)
