"""Which implementation computes each operation, where there is a choice."""

from __future__ import annotations

from typing import Literal

from dist_llm.config.base import Section

Backend = Literal["auto", "reference", "native"]
Product = Literal["auto", "reference", "onednn"]


class KernelsConfig(Section):
    """What computes an operation: reference: PyTorch; native: the compiled library (CPU; fp32, bf16 and fp16).
    onednn: the products of torch's oneDNN (CPU; fp32).

    auto takes the fastest that was measured for the device and is to be had for it; in bf16 and fp16 the reference.
    """

    required: bool = False
    """Refuse to start where something else would have to compute than what was named, or than auto would prefer."""
    rms_norm: Backend = "auto"
    """RMSNorm, alone and with the sum of the residual before it."""
    layer_norm: Backend = "auto"
    """LayerNorm, alone and with the sum of the residual before it."""
    gelu: Backend = "auto"
    """GELU in its tanh form; the exact form is always PyTorch's."""
    swiglu: Backend = "auto"
    """SwiGLU's silu(gate) * up, also of experts."""
    rope: Backend = "auto"
    """Rotary positions of queries and keys, in one pass."""
    cross_entropy: Backend = "auto"
    """The loss of the logits; native writes their gradient over them. engine=megatron has the reference."""
    linear: Product = "auto"
    """The products of linear layers and of their inputs' gradients; those of weights' gradients are the BLAS's."""
