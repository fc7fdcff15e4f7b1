"""The whole run: one frozen tree. It stops at `train/setup.py`; below it a function gets its own section."""

from __future__ import annotations

from typing import Literal

from dist_llm.config.base import Section
from dist_llm.config.inputs import DataConfig, TokenizerConfig
from dist_llm.config.model import ModelConfig
from dist_llm.config.operations import (
    CheckpointConfig,
    ClusterConfig,
    EngineConfig,
    LauncherConfig,
    RunSection,
    TelemetryConfig,
)
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.training import OptimizerConfig, PrecisionConfig, ScheduleConfig


class RunConfig(Section):
    """All sections of a run."""

    run: RunSection
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    telemetry: TelemetryConfig
    launcher: LauncherConfig
    cluster: ClusterConfig
