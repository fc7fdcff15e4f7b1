"""What the cost of a layer depends on, as plain numbers, so that layouts that agree in them share one answer."""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.accounting.memory import FORMAT_BYTES
from dist_llm.config.run import RunConfig


@dataclass(frozen=True)
class Shape:
    """One microbatch of one rank: sizes of the model, of its split, and how attention and recompute go about it.

    tokens: of a context rank. written: whether scores go to memory. again: operators that a backward runs again, or
    all of a block where `full`. sum_bytes: moved to add a gradient to its sum.
    """

    microbatch: int
    seq_len: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    gated: bool
    biased: bool
    dropout: bool
    attention_dropout: bool
    written: bool
    vocab: int
    experts: int
    top_k: int
    expert_inner: int
    shared_experts: int
    tensor: int
    sequence: bool
    async_tensor: bool
    context: int
    head_ranks: int
    expert_ranks: int
    full: bool
    again: tuple[str, ...]
    width: int
    master_width: int
    sum_bytes: int
    compiled: bool

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch that a context rank holds."""
        return self.microbatch * self.seq_len // self.context

    @property
    def spread(self) -> int:
        """Ranks among which tokens are split where features are not."""
        return self.tensor if self.sequence else 1

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of one microbatch."""
        return self.tokens * self.hidden * self.width


def writes_scores(config: RunConfig) -> bool:
    """Return whether attention keeps its scores in memory, as cluster.practice has it."""
    parallel = config.parallel
    if config.cluster.practice == "native":
        return False
    return parallel.recompute != "none" and parallel.zero < 3


def _sum_bytes(config: RunConfig) -> int:
    """Return the bytes that adding a gradient to its sum over microbatches moves: it is read, the sum read and written.

    0 where the product itself adds to the sum, in the shade of its arithmetic: fused, as Megatron has it. DeepSpeed
    adds up fp16 in fp16.
    """
    parallel, practice = config.parallel, config.cluster.practice
    if parallel.fused_accumulation or (practice == "megatron" and parallel.zero < 3):
        return 0
    width, master = FORMAT_BYTES[config.precision.compute], FORMAT_BYTES[config.precision.master]
    return width + 2 * (width if practice == "megatron_deepspeed" and config.precision.compute == "fp16" else master)


def shape_of(config: RunConfig, microbatches: int) -> Shape:
    """Return what a layer of the config costs by."""
    model, parallel = config.model, config.parallel
    again = parallel.recompute_operators if parallel.recompute == "selective" else ()
    moe = model.moe
    return Shape(
        microbatch=config.data.microbatch,
        seq_len=config.data.seq_len,
        hidden=model.hidden_size,
        heads=model.num_heads // parallel.tensor,
        kv_heads=max(1, model.kv_heads // parallel.tensor),
        head_width=model.head_width,
        inner=model.ffn_hidden_size,
        gated=model.activation == "swiglu",
        biased=model.bias,
        dropout=model.dropout > 0,
        attention_dropout=model.attention_dropout > 0,
        written=writes_scores(config),
        vocab=model.vocab_size,
        experts=moe.num_experts,
        top_k=min(moe.top_k, moe.num_experts),
        expert_inner=model.expert_width if moe.num_experts else 0,
        shared_experts=moe.num_shared if moe.num_experts else 0,
        tensor=parallel.tensor,
        sequence=parallel.sequence and parallel.tensor > 1,
        async_tensor=parallel.async_tensor,
        context=parallel.context,
        head_ranks=parallel.head_ranks,
        expert_ranks=parallel.expert,
        full=parallel.recompute == "full",
        again=again,
        width=FORMAT_BYTES[config.precision.compute],
        master_width=FORMAT_BYTES[config.precision.master],
        sum_bytes=_sum_bytes(config) if microbatches > 1 else 0,
        compiled=parallel.compile,
    )
