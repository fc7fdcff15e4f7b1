"""The golden runs: 20 steps of a tiny model on a small text, in bytes, through the real data order and the real engine.

corpus.txt (Lewis Carroll, 1865, in the public domain) is read as bytes, a paragraph a document, so that no tokenizer's
version is part of the numbers. curves.json holds the curves in fp64: they do not depend on a machine's rounding, and
fp32 is held to them as closely as the promise says.
"""

from __future__ import annotations

import json
from pathlib import Path

from dist_llm.config.run import RunConfig
from dist_llm.data.indexed import IndexedDataset, IndexedWriter
from dist_llm.data.loader import TokenLoader
from tests.parallel.tiny import GPT2, LLAMA, Curve, build, tiny_config

FOLDER = Path(__file__).parent
CURVES = FOLDER / "curves.json"
STEPS = 20
EOS = 256
SIZES: dict[str, object] = {"vocab_size": 257, "max_seq_len": 32}
MODELS: dict[str, dict[str, object]] = {"gpt2": {**GPT2, **SIZES}, "llama": {**LLAMA, **SIZES, "init_std": 0.1}}
"""Llama starts at 0.1: from 0.02 the row of a rare byte passes near zero, where RMSNorm magnifies fp32's rounding."""
LAYOUTS: dict[str, dict[str, object]] = {
    "gpt2": {"tensor": 2, "sequence": True, "data": 2, "zero": 3},
    "llama": {"tensor": 2, "sequence": True, "pipeline": 2, "zero": 1},
}
"""A mixed layout of 4 ranks for each model."""


def golden_config(model: str, precision: str, parallel: dict[str, object] | None = None, lr: float = 1e-3) -> RunConfig:
    """Return the golden run of a model on a layout (None: one process)."""
    return tiny_config(
        parallel,
        MODELS[model],
        {"seq_len": 32, "document_mask": True},
        run={"steps": STEPS, "seed": 1},
        optimizer={"lr": lr},
        schedule={"name": "cosine", "warmup_steps": 4},
        precision={"name": precision},
    )


def write_tokens(folder: Path) -> str:
    """Write the corpus as indexed tokens into a folder and return their prefix."""
    prefix = folder / "corpus"
    paragraphs = (FOLDER / "corpus.txt").read_bytes().split(b"\n\n")
    with IndexedWriter(prefix, EOS + 1) as writer:
        for paragraph in paragraphs:
            writer.add([*paragraph, EOS])
    return str(prefix)


def train_curve(config: RunConfig, prefix: str) -> Curve:
    """Train on this rank; return (loss, gradient norm) of every step."""
    engine = build(config)
    dataset = IndexedDataset(Path(prefix))
    source = TokenLoader(dataset, config.data, config.run.seed, engine.data_slice, EOS, config.model.vocab_size)
    results = [engine.train_step(source.batch(step)) for step in range(config.run.steps)]
    return [(result.loss, result.grad_norm) for result in results]


def read_curves() -> dict[str, Curve]:
    """Return the golden curve of each model."""
    stored = json.loads(CURVES.read_text(encoding="utf-8"))
    return {name: list(zip(curve["loss"], curve["grad_norm"], strict=True)) for name, curve in stored.items()}


def write_curves(curves: dict[str, Curve]) -> None:
    """Write the golden curve of each model."""
    stored = {
        name: {"loss": [loss for loss, _ in curve], "grad_norm": [norm for _, norm in curve]}
        for name, curve in curves.items()
    }
    CURVES.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
