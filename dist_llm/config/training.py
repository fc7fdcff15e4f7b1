"""How weights change: optimizer, learning-rate schedule and number formats."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_llm.config.base import Count, CountOrZero, Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]
"""Share of a running mean that one step keeps."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019) with decoupled decay on matrices only and global-norm clipping (0: off)."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: Annotated[tuple[DecayRate, DecayRate], Field(strict=False)] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0)


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up to `optimizer.lr`, then the named decay down to `min_ratio` of it."""

    name: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    warmup_steps: CountOrZero = 0
    decay_steps: Count | None = None
    min_ratio: float = Field(0.1, ge=0, le=1)


class PrecisionConfig(Section):
    """Number formats. Master weights, optimizer state and gradient reductions are `master` whatever `compute` is."""

    name: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    initial_loss_scale: float = Field(65536.0, gt=0)
    loss_scale_window: Count = 1000
    max_skipped_steps: Count = 50

    @property
    def compute(self) -> str:
        """Format of matrix products and activations."""
        return self.name

    @property
    def master(self) -> str:
        """Format of master weights, optimizer state and reductions."""
        return "fp64" if self.name == "fp64" else "fp32"
