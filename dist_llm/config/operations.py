"""What surrounds the steps: run identity, checkpoints, telemetry, engine, launcher and cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dist_llm.config.base import Count, CountOrZero, PathText, Section


class RunSection(Section):
    """Identity and length of the run; files go to `<dir>/<name>/`."""

    name: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="a folder name: letters, digits, '.', '_' and '-', at most 128, first a letter or digit",
    )
    dir: PathText = "runs"
    steps: CountOrZero = 100
    seed: int = Field(0, ge=0, lt=2**63)
    resume: Literal["auto", "must", "never"] = "auto"
    deterministic: bool = True

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.dir).expanduser() / self.name


class CheckpointConfig(Section):
    """A checkpoint every `interval` steps (0: only at the end); `keep` newest are kept (at least 1)."""

    interval: CountOrZero = 100
    keep: Count = 2
    asynchronous: bool = False


class TelemetryConfig(Section):
    """What is reported, and how often (steps)."""

    log_interval: Count = 1
    eval_interval: CountOrZero = 0
    eval_batches: Count = 4
    tensorboard: bool = True
    wandb: bool = False
    picture: bool = True
    sample_tokens: CountOrZero = 0
    sample_prompt: str = Field("", max_length=65536)


class EngineConfig(Section):
    """Which engine does the step."""

    name: Literal["native", "deepspeed", "megatron"] = "native"


class LauncherConfig(Section):
    """Who starts the ranks. nproc: ranks on a node; threads: intra-op CPU threads of a rank (null: cores / nproc)."""

    name: Literal["local", "torchrun", "slurm", "mpi", "container"] = "local"
    nproc: int = Field(1, ge=1, le=4096)
    nodes: int = Field(1, ge=1, le=65536)
    threads: int | None = Field(None, ge=1, le=4096)
    timeout_seconds: float = Field(600.0, gt=0, le=10**7)


class PeakTflops(Section):
    """Dense peak of one device by compute format, in TFLOP/s (no structured sparsity)."""

    fp32: float = Field(gt=0)
    bf16: float = Field(gt=0)
    fp16: float = Field(gt=0)
    fp64: float = Field(gt=0)


class ClusterConfig(Section):
    """The hardware. For a CPU box a device is a core and devices_per_node null means the cores that are there."""

    name: str
    device: Literal["cpu", "cuda"]
    devices_per_node: Count | None
    peak_tflops: PeakTflops
    memory_gib: float = Field(gt=0)
    source: str
