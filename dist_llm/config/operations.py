"""What surrounds the steps: run identity, checkpoints, telemetry, engine and launcher."""

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
    """Name and folder of the run: letters, digits, `.`, `_` and `-`, at most 128, first a letter or digit."""
    dir: PathText = "runs"
    """Folder that holds the folders of runs."""
    steps: CountOrZero = 100
    """Optimizer steps of the whole run, those before a resume included; 0: the initial weights are saved."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of initial weights, sample order and dropout."""
    resume: Literal["auto", "must", "never"] = "auto"
    """Go on from the newest checkpoint if there is one (auto), or fail (must); never: refuse a folder with a run."""
    deterministic: bool = True
    """Use torch's deterministic algorithms, and fail where an operation has none."""

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.dir).expanduser() / self.name


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    interval: CountOrZero = 100
    """Steps from one checkpoint to the next, beside the one when the run ends or is stopped; 0: that one alone."""
    keep: Count = 2
    """Newest sound checkpoints that are kept; older ones are deleted when one is saved, but not at a step that was
    skipped or when the run is stopped. With 1 the newest is alone, even where its weights turn out to be ruined."""
    asynchronous: bool = False
    """Save beside the training steps; this version takes false only."""


class TelemetryConfig(Section):
    """What is reported, and how often."""

    log_interval: Count = 1
    """Steps from one update of the progress line to the next; metrics.jsonl has every step."""
    eval_interval: CountOrZero = 0
    """Steps from one evaluation to the next, on what data.validation_fraction keeps; 0: none."""
    eval_batches: Count = 4
    """Global batches in one evaluation, the same each time."""
    tensorboard: bool = True
    """Write each step's scalars to `tensorboard/` in the run's folder."""
    wandb: bool = False
    """Log each step to Weights & Biases; needs the extra `wandb`."""
    picture: bool = True
    """Draw `loss.png` when the run is done."""
    sample_tokens: CountOrZero = 0
    """Tokens of text, at most, that the model writes to `sample.txt` when the run is done; 0: no sample."""
    sample_prompt: str = Field("", max_length=65536)
    """Text that the sample goes on from; empty: a new document."""


class EngineConfig(Section):
    """Which engine does the step, and what only one of them can do."""

    name: Literal["native", "deepspeed", "megatron"] = "native"
    """Engine of an optimizer step: ours, DeepSpeed's ZeRO on our model, or Megatron-Core's model and optimizer."""
    offload_to: Literal["cpu", "nvme"] = "cpu"
    """Where DeepSpeed keeps what parallel.offload names: host memory, or files (ZeRO-Infinity, Rajbhandari et al.
    2021)."""
    nvme_path: PathText | None = None
    """Folder of those files, on each node; needed by `offload_to: nvme`."""
    transformer_engine: Literal["auto", "never"] = "auto"
    """Whether Megatron-Core's layers are Transformer Engine's where that is installed and the device is CUDA."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """Format of Transformer Engine's products (Micikevicius et al. 2022); hybrid: e4m3 forward, e5m2 backward."""
    overlap: bool = True
    """Let Megatron-Core send gradients during the backward and gather weights during the forward."""


class LauncherConfig(Section):
    """Who starts the ranks, how many, and with what limits."""

    name: Literal["local", "torchrun", "slurm", "mpi", "container"] = "local"
    """What `dist-llm launch` starts ranks with: this machine, or a job of SLURM; this version takes no other."""
    nproc: int = Field(1, ge=1, le=4096)
    """Ranks that `dist-llm launch` starts on a node."""
    nodes: int = Field(1, ge=1, le=65536)
    """Nodes that `dist-llm launch` starts ranks on; `local` starts them on one."""
    threads: int | None = Field(None, ge=1, le=4096)
    """Intra-op CPU threads of a rank; null: the node's usable cores / its ranks, at least 1."""
    timeout_seconds: float = Field(600.0, gt=0, le=10**7)
    """Time after which a collective, or the meeting of the ranks, fails, in seconds."""
