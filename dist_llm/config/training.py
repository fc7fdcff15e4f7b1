"""How weights change: optimizer, learning-rate schedule and number formats."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_llm.config.base import Count, CountOrZero, Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]
"""Share of a running mean that one step keeps."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019) with decoupled decay on matrices only and global-norm clipping."""

    name: Literal["adamw"] = "adamw"
    """Rule of the update."""
    lr: float = Field(3e-4, gt=0)
    """Learning rate at its peak, the end of warm-up."""
    weight_decay: float = Field(0.1, ge=0)
    """A step takes learning rate x weight_decay of each matrix, embeddings included, off it; vectors do not decay."""
    betas: Annotated[tuple[DecayRate, DecayRate], Field(strict=False)] = (0.9, 0.95)
    """Share that a step keeps of the running means of the gradient and of its square (Kingma & Ba 2015)."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the mean square of the gradient, by which an update is divided."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient, to which a larger one is scaled down (Pascanu et al. 2013); 0: off."""


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up to `optimizer.lr`, then the named decay down to `min_ratio` of it."""

    name: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    """Decay: cosine (Loshchilov & Hutter 2017), inverse_sqrt (Vaswani et al. 2017), wsd, late (Hu et al. 2024)."""
    warmup_steps: CountOrZero = 0
    """Steps of warm-up; inverse_sqrt then falls as the root of warmup_steps / step."""
    decay_steps: Count | None = None
    """Steps of decay: for cosine and linear after warm-up (null: to the end), for wsd the last ones (null: a tenth)."""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """Floor of the decay, as a share of optimizer.lr."""


class PrecisionConfig(Section):
    """Number formats. Master weights, optimizer state and gradient reductions are fp64 under `fp64`, else fp32."""

    name: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Format of matrix products and activations; fp64 is for verification on CPU."""
    initial_loss_scale: float = Field(65536.0, ge=1)
    """Factor on the loss that fp16 starts with (Micikevicius et al. 2018); other formats use 1."""
    loss_scale_window: Count = 1000
    """Steps without overflow, in a row, after which fp16's loss scale doubles; an overflow halves it."""
    max_skipped_steps: Count = 50
    """Steps with a non-finite loss or gradient, in a row, that end the run; each is skipped."""

    @property
    def compute(self) -> str:
        """Format of matrix products and activations."""
        return self.name

    @property
    def master(self) -> str:
        """Format of master weights, optimizer state and reductions."""
        return "fp64" if self.name == "fp64" else "fp32"
