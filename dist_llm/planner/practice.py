"""What published runs of 2021 to 2023 had that our engine has not: which layers, and whose pipeline and sums.

    engine=megatron                             Megatron-LM, or Megatron-Core of today
    engine=deepspeed, cluster.practice=megatron Megatron-DeepSpeed below ZeRO 3: Megatron's layers, DeepSpeed's the rest
    engine=deepspeed elsewhere, or native       our layers

Without Transformer Engine's kernels Megatron's layers write scores to memory (Korthikanti et al. 2022, section 4.1).
"""

from __future__ import annotations

from dist_llm.accounting.memory import FORMAT_BYTES
from dist_llm.config.run import RunConfig


def is_megatron_deepspeed(config: RunConfig) -> bool:
    """Return whether Megatron-DeepSpeed is foretold, of which BLOOM's runs are (Scao et al. 2022)."""
    past = config.cluster.practice == "megatron" and config.parallel.zero < 3
    return past and config.engine.name == "deepspeed"


def keeps_scores(config: RunConfig) -> bool:
    """Return whether attention writes its scores to memory and keeps them for the backward."""
    theirs = config.engine.name == "megatron" or is_megatron_deepspeed(config)
    return theirs and config.engine.transformer_engine == "never"


def gradient_width(config: RunConfig) -> int:
    """Return the bytes of an element of what data ranks sum: Megatron of 2021 to 2023 left those of fp16 in fp16."""
    precision, past = config.precision, config.cluster.practice == "megatron" and config.parallel.zero < 3
    halves = past and config.engine.name != "native" and precision.compute == "fp16"
    return FORMAT_BYTES[precision.compute if halves else precision.master]


def sum_bytes(config: RunConfig) -> int:
    """Return the bytes that adding a gradient to its sum over microbatches moves: it is read, the sum read and written.

    0 where the product itself adds to the sum: fused, as Megatron-LM has it. Megatron-DeepSpeed adds up fp16 in fp16,
    and of bf16 makes an fp32 copy first (its BF16_Optimizer).
    """
    compute, master = FORMAT_BYTES[config.precision.compute], FORMAT_BYTES[config.precision.master]
    past = config.cluster.practice == "megatron" and config.parallel.zero < 3
    if config.parallel.fused_accumulation or (past and config.engine.name != "deepspeed"):
        return 0
    if is_megatron_deepspeed(config):
        return 3 * compute if gradient_width(config) == compute else compute + 4 * master
    return compute + 2 * master
