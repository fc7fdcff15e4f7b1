"""The feed-forward half of a block: GELU (Hendrycks & Gimpel 2016) or SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dist_llm.config.model import ModelConfig
from dist_llm.ops.gelu import gelu
from dist_llm.ops.linear import Linear
from dist_llm.ops.registry import Kernels
from dist_llm.ops.swiglu import swiglu


def activate(
    up: Float[Tensor, "*rows inner"], gate: Float[Tensor, "*rows inner"] | None, approximate: str, kernels: Kernels
) -> Float[Tensor, "*rows inner"]:
    """Return silu(gate) * up, or gelu(up) where there is no gate; approximate: tanh or none."""
    if gate is not None:
        return swiglu(gate, up, kernels.swiglu)
    return gelu(up, kernels.gelu) if approximate == "tanh" else functional.gelu(up)


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)) for SwiGLU."""

    kernels = Kernels()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.gate = Linear(width, inner, bias=config.bias) if config.activation == "swiglu" else None
        self.up = Linear(width, inner, bias=config.bias)
        self.down = Linear(inner, width, bias=config.bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch _ width"]:
        """Map every token alone. Under sequence parallelism this rank's part comes back."""
        gate = None if self.gate is None else self.gate(x)
        out: Tensor = self.down(self.activation(self.up(x), gate))
        return out

    def activation(
        self, up: Float[Tensor, "batch seq inner"], gate: Float[Tensor, "batch seq inner"] | None
    ) -> Float[Tensor, "batch seq inner"]:
        """Return what the last linear takes."""
        return activate(up, gate, self.approximate, self.kernels)
