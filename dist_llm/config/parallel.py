"""How the run is laid out over ranks: sizes of the mesh axes, the pipeline schedule, ZeRO stage and recompute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_llm.config.base import Choice, Count, CountOrZero, Section

Operator = Literal["core_attn", "norm", "activation", "mlp"]

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"]

V_SCHEDULES = ("zbv", "dualpipev")
"""Schedules whose ranks hold stages r and 2n - 1 - r: down the ranks and up again."""


class ParallelConfig(Section):
    """Sizes of the mesh axes, the pipeline's schedule, what ZeRO shards and what is recomputed."""

    tensor: Count = 1
    """Ranks that split the heads, the feed-forward width and the vocabulary (Shoeybi et al. 2019)."""
    sequence: bool = False
    """Split the sequence over the tensor ranks where features are not split over them (Korthikanti et al. 2022)."""
    pipeline: Count = 1
    """Ranks that split the layers into consecutive stages (Narayanan et al. 2021)."""
    virtual_pipeline: Count = 1
    """Stages that each pipeline rank holds: 1 under gpipe and 1f1b, 2 under zbv and dualpipev (1 then means 2)."""
    schedule: Schedule = "1f1b"
    """Order of forwards and backwards when pipeline is above 1; zero_bubble, zbv and dualpipev run some backwards of
    weights later (Qi et al. 2023; DeepSeek-V3 2024)."""
    context: Count = 1
    """Ranks that split each sequence, each keeping a chunk from its front and one from its back."""
    context_method: Literal["ring", "ulysses", "mixed"] = "ring"
    """Attention over context ranks: ring (Liu et al. 2023), ulysses (Jacobs et al. 2023) or mixed, rings of ranks that
    exchange heads (Fang & Zhao 2024); no effect at `context: 1`."""
    context_heads: Count = 1
    """Ranks of context that exchange heads under mixed, context / context_heads being in a ring; else 1, as ring means
    none of them and ulysses all, so that no method changes with a number."""
    expert: Count = 1
    """Ranks that split the experts of a mixture; they are ranks of data x context, not more of them."""
    data: Count | None = None
    """Ranks that split the global batch; null: all ranks / (tensor x pipeline x context)."""
    replicate: Count = 1
    """Copies of what ZeRO shards, each spread over data / replicate ranks (HSDP); 1 under `zero: 0`."""
    zero: Annotated[Literal[0, 1, 2, 3], Choice] = 1
    """ZeRO stage (Rajbhandari et al. 2020): 0 shards nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in host memory (Ren et al. 2021): nothing; optimizer state, with the update run there; or that and the
    shards of parameters and gradients."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that a backward computes again: none, of some operators, or all of a block (Chen et al. 2016)."""
    recompute_operators: Annotated[tuple[Operator, ...], Field(strict=False, min_length=1)] = ("core_attn",)
    """What `recompute: selective`, and it alone, computes again: core_attn is scores and softmax (Korthikanti et al.
    2022), norm and activation give up their results too, mlp is all of the feed-forward layer."""
    recompute_layers: Count | None = None
    """Blocks of each stage that are recomputed, its first ones (Megatron-LM's block method); null: all of them."""
    async_tensor: bool = False
    """Multiply while sequence parallelism's tensors travel (Wang et al. 2023), on CUDA devices that map each other's
    memory; elsewhere, and at `tensor: 1`, no effect."""
    compile: bool = False
    """Compile the blocks with torch.compile, once for all of them."""
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """What compiles them: inductor (a C++ compiler on a CPU, Triton on a GPU), or aot_eager, which fuses nothing; no
    effect without `compile`."""
    fused_accumulation: bool = False
    """Add each linear's weight gradient to its fp32 sum over microbatches in the product that computes it."""
    unit_blocks: Count = 1
    """Consecutive blocks that FSDP gathers and reduces in one collective (experts: one block's); no effect without
    FSDP."""
    prefetch: CountOrZero = 1
    """Units that FSDP gathers ahead of the one that computes, forward and back; no effect without FSDP."""
    bucket_mib: int = Field(64, ge=1, le=2**16)
    """Size of the buckets in which gradients outside FSDP are all-reduced, in MiB; a larger tensor goes alone."""

    @property
    def model_ranks(self) -> int:
        """Ranks that one copy of the model takes: tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context

    @property
    def head_ranks(self) -> int:
        """Context ranks that exchange heads: none but itself under ring, all under ulysses, as set under mixed."""
        return {"ring": 1, "ulysses": self.context, "mixed": self.context_heads}[self.context_method]

    @property
    def ring_ranks(self) -> int:
        """Context ranks that pass keys and values round: context / head_ranks."""
        return self.context // self.head_ranks

    @property
    def chunks(self) -> int:
        """Stages of each pipeline rank: as set, or the two of a V-shaped schedule."""
        in_a_v = self.pipeline > 1 and self.schedule in V_SCHEDULES
        return max(2, self.virtual_pipeline) if in_a_v else self.virtual_pipeline

    def recomputed_layers(self, layers: range) -> range:
        """Return which of a stage's layers are recomputed."""
        return layers[: 0 if self.recompute == "none" else self.recompute_layers]

    def computes_again(self, operator: Operator) -> bool:
        """Whether the layers that are recomputed run an operator again."""
        listed = self.recompute == "selective" and operator in self.recompute_operators
        return listed or self.recompute == "full"

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule may run the backward of a stage's weights after that of its inputs."""
        return self.pipeline > 1 and self.schedule in ("zero_bubble", *V_SCHEDULES)

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks, virtual ones included."""
        return self.pipeline * self.chunks
