"""Which implementation computes each operation, where there is a choice."""

from __future__ import annotations

from typing import Literal

from dist_llm.config.base import Section

Norm = Literal["auto", "reference", "torch", "native", "triton", "apex", "transformer_engine"]
Function = Literal["auto", "reference", "torch", "native", "triton"]
Kernel = Literal["auto", "reference", "native", "triton"]
Product = Literal["auto", "reference", "onednn"]


class KernelsConfig(Section):
    """What computes an operation. reference: the formula in PyTorch; torch: PyTorch's own function for it; native: the
    compiled library (CPU); triton: Triton's kernels (GPU; norms of up to 8192 features); apex and
    transformer_engine: NVIDIA's (GPU). These four compute fp32, bf16 and fp16. onednn: the products of torch's oneDNN
    (CPU; fp32).

    auto takes on a CPU the fastest that was measured, in fp32; on a GPU, unmeasured, triton where it moves fewer bytes
    than PyTorch, outside of blocks that `parallel.compile` has inductor fuse. Else, and where that is not to be had,
    PyTorch: torch for LayerNorm and GELU (and on a GPU RMSNorm), the reference for the rest.
    """

    required: bool = False
    """Refuse to start where something else would have to compute than what was named, or than auto would prefer."""
    rms_norm: Norm = "auto"
    """RMSNorm, alone and with the sum of the residual before it."""
    layer_norm: Norm = "auto"
    """LayerNorm, alone and with the sum of the residual before it."""
    gelu: Function = "auto"
    """GELU in its tanh form; the exact form is always PyTorch's."""
    swiglu: Kernel = "auto"
    """SwiGLU's silu(gate) * up, also of experts."""
    rope: Kernel = "auto"
    """Rotary positions of queries and keys, in one pass."""
    cross_entropy: Function = "auto"
    """The loss of the logits; native and triton write their gradient over them; torch needs `parallel.tensor=1`.
    engine=megatron has the reference."""
    linear: Product = "auto"
    """The products of linear layers and of their inputs' gradients; weights' gradients are always the BLAS's."""
