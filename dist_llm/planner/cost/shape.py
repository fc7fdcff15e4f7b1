"""What the cost of a layer depends on, as plain numbers, so that layouts that agree in them share one answer."""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.accounting.memory import FORMAT_BYTES
from dist_llm.config.run import RunConfig
from dist_llm.planner.practice import keeps_scores, sum_bytes


@dataclass(frozen=True)
class Shape:
    """One microbatch of one rank: sizes of the model, of its split, and how attention and recompute go about it.

    tokens: of a context rank. written: whether scores go to memory. again: operators that a backward runs again, or
    all of a block where `full`. sum_bytes: moved to add a gradient to its sum. ends_again: recompute runs a
    block's last sum over tp too.
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
    ends_again: bool

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


def _keeps_its_end(config: RunConfig) -> bool:
    """Return whether something after a block's last sum is kept for the backward, so that recompute sums again."""
    model, parallel = config.model, config.parallel
    return model.dropout > 0 or model.norm_placement == "post" or (parallel.compile and not parallel.splits_backward)


def sends_parts(config: RunConfig) -> bool:
    """Return whether each tensor rank sends its part of the hidden states to the next stage.

    So do Megatron-LM (Narayanan et al. 2021, section 4.1) and DeepSpeed's pipeline (partitioned tensors).
    """
    return config.parallel.sequence or config.cluster.practice == "megatron"


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
        written=keeps_scores(config),
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
        sum_bytes=sum_bytes(config) if microbatches > 1 else 0,
        compiled=parallel.compile,
        ends_again=config.cluster.practice != "native" or _keeps_its_end(config),
    )
