"""What a plan starts from: a budget, a cluster, the text there is, what the model will serve. Nulls are for the plan.

A request is not a run: `dist-llm plan` takes it, and the config that it writes is a run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_llm.config.base import Choice, Count, Section
from dist_llm.config.cluster import ClusterConfig
from dist_llm.config.inputs import DataConfig
from dist_llm.config.model import ModelConfig, MoEConfig
from dist_llm.config.parallel import Schedule

MOST = 1e30
"""More than any budget, so that products of figures stay finite."""


class BudgetRequest(Section):
    """What may be spent: one of these."""

    flops: float | None = Field(None, gt=0, le=MOST)
    """Training compute, 6 x parameters x tokens, in FLOPs. With serving.tokens it sets the loss, that of the best model
    of so many; the smaller model that is as good trains longer."""
    gpu_hours: float | None = Field(None, gt=0, le=MOST)
    """Hours of one device of the cluster, all devices added up."""
    usd: float | None = Field(None, gt=0, le=MOST)
    """Money, in US dollars, at the cluster's price of a device-hour."""


class DataRequest(Section):
    """The text there is."""

    tokens: float | None = Field(None, ge=1, le=MOST)
    """Distinct tokens; where more are needed they are repeated (Muennighoff et al. 2023). null: as many as needed."""
    seq_len: Count | None = None
    """Length of a training sequence, in tokens; null: 512 below 100 million parameters, 2048 below a billion, else
    4096, and at most what a given model takes."""
    global_batch: Count | None = None
    """Sequences a step; null: by published power laws."""
    microbatch: Count | None = None
    """Sequences of one forward; null: what is fastest and fits."""
    path: str = DataConfig.model_fields["path"].default
    """Corpus of the config that is written."""


class ServingRequest(Section):
    """What the trained model will do."""

    tokens: float = Field(0.0, ge=0, le=1e18)
    """Tokens that it will read and write; with many a smaller model trained longer is cheaper (Sardana et al. 2024)."""


class ModelRequest(Section):
    """What is fixed of the model; what is null is searched."""

    family: Literal["gpt2", "llama"] = "llama"
    """Published layout whose options the model has."""
    num_layers: Count | None = None
    """Transformer blocks."""
    hidden_size: Count | None = None
    """Width of the hidden states, in elements."""
    num_heads: Count | None = None
    """Query heads; null: of width 64 below a billion parameters, else 128, or of a width near that divides."""
    num_kv_heads: Count | None = None
    """Key and value heads; null: as many as query heads, from 8 billion parameters 8."""
    ffn_hidden_size: Count | None = None
    """Inner width of the feed-forward layer; null: 4 x hidden_size for GELU, 8/3 for SwiGLU."""
    vocab_size: Count | None = None
    """Tokens of the vocabulary; null: that of the family, fewer for small models."""
    tie_embeddings: bool | None = None
    """Whether the output projection is the token embedding; null: below a billion parameters."""
    moe: MoEConfig = MoEConfig()
    """Experts; laws then count the parameters that a token meets."""


class LayoutRequest(Section):
    """What is fixed of the layout, as settings of `parallel` (config/parallel.py); what is null is weighed."""

    tensor: Count | None = None
    """Tensor ranks."""
    sequence: bool | None = None
    """Whether tensor ranks split the sequence; null: where it can be split."""
    pipeline: Count | None = None
    """Pipeline ranks."""
    virtual_pipeline: Count | None = None
    """Stages of a pipeline rank."""
    schedule: Schedule | None = None
    """Pipeline schedule; null: 1f1b or interleaved."""
    context: Count | None = None
    """Context ranks; null: 1 below 8192 tokens."""
    expert: Count | None = None
    """Expert ranks."""
    data: Count | None = None
    """Data ranks."""
    zero: Annotated[Literal[0, 1, 2, 3] | None, Choice] = None
    """ZeRO stage; null: 1, or 3 without a pipeline."""
    recompute: Literal["none", "selective", "full"] | None = None
    """What is recomputed; null: as little as fits."""


class PlanRequest(Section):
    """All that `dist-llm plan` is told."""

    budget: BudgetRequest = BudgetRequest()
    """What may be spent."""
    data: DataRequest = DataRequest()
    """The text there is."""
    serving: ServingRequest = ServingRequest()
    """What the trained model will do."""
    model: ModelRequest = ModelRequest()
    """What is fixed of the model."""
    preset: ModelConfig | None = None
    """A whole model, `model=<preset>`: only its tokens and layout are planned."""
    parallel: LayoutRequest = LayoutRequest()
    """What is fixed of the layout."""
    cluster: ClusterConfig
    """The hardware, and how many nodes of it."""
    law: str = Field("besiroglu", min_length=1, max_length=4096)
    """Scaling law: one of the published, or the file that `dist-llm plan fit --write` has written."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Format of products; null: bf16 on GPUs, fp32 on CPUs."""
    launcher: Literal["local", "slurm"] | None = None
    """What starts the ranks of the written config; null: local on one node, else slurm."""
    engine: Literal["native", "megatron", "deepspeed"] = "native"
    """Engine of the run."""
