"""The whole run: one frozen tree. It stops at `train/setup.py`; below it a function gets its own section."""

from __future__ import annotations

from typing import Literal

from dist_llm.config.base import Section
from dist_llm.config.cluster import ClusterConfig
from dist_llm.config.inputs import DataConfig, TokenizerConfig
from dist_llm.config.kernels import KernelsConfig
from dist_llm.config.model import ModelConfig
from dist_llm.config.operations import (
    CheckpointConfig,
    EngineConfig,
    LauncherConfig,
    RunSection,
    TelemetryConfig,
)
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.training import OptimizerConfig, PrecisionConfig, ScheduleConfig


class RunConfig(Section):
    """All sections of a run, and the kind of device that it runs on."""

    run: RunSection
    """Identity and length of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of every rank, on CUDA one each; auto: cuda where torch sees one, else cpu."""
    model: ModelConfig
    """Shape and options of the transformer."""
    parallel: ParallelConfig
    """Layout over the ranks."""
    engine: EngineConfig
    """What does an optimizer step."""
    optimizer: OptimizerConfig
    """Rule of the update."""
    schedule: ScheduleConfig
    """Learning rate over steps."""
    precision: PrecisionConfig
    """Number formats."""
    kernels: KernelsConfig = KernelsConfig()
    """What computes an operation."""
    data: DataConfig
    """Corpus and batches."""
    tokenizer: TokenizerConfig
    """Text to tokens."""
    checkpoint: CheckpointConfig
    """When to save, and how much to keep."""
    telemetry: TelemetryConfig
    """What is reported, and how often."""
    launcher: LauncherConfig
    """How ranks are started."""
    cluster: ClusterConfig
    """Hardware, by which MFU is reckoned."""
