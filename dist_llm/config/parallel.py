"""How the run is laid out over ranks: sizes of the mesh axes, the pipeline schedule, ZeRO stage and recompute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_llm.config.base import Choice, Count, Section

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"]


class ParallelConfig(Section):
    """Sizes of the mesh axes. `data` is derived from the number of ranks when it is null."""

    tensor: Count = 1
    sequence: bool = False
    pipeline: Count = 1
    virtual_pipeline: Count = 1
    schedule: Schedule = "1f1b"
    context: Count = 1
    context_method: Literal["ring", "ulysses"] = "ring"
    expert: Count = 1
    data: Count | None = None
    replicate: Count = 1
    zero: Annotated[Literal[0, 1, 2, 3], Choice] = 1
    recompute: Literal["none", "selective", "full"] = "none"
    bucket_mib: int = Field(64, ge=1, le=2**16)

    @property
    def model_ranks(self) -> int:
        """Ranks that one copy of the model takes: tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks, virtual ones included."""
        return self.pipeline * self.virtual_pipeline
