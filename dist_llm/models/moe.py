"""A feed-forward layer of experts: a router sends each token to a few of them (Shazeer et al. 2017; DeepSeek-V3 2024).

    y = shared(x) + scale sum over chosen e of w_e expert_e(x)      chosen: the k largest of s + bias, w: their s
    balance = coef E / (k T) sum over t, e of count_e s_te / sum s_t (Fedus et al. 2021)
    z       = coef sum over t of logsumexp(logits_t)^2               (Zoph et al. 2022)

Losses are of a sequence, in the unit of token losses, so that layouts cannot change them. They enter the gradient in
the router's backward, which also counts what experts were given: once, even where a block is computed again. Once a
step the bias moves by the global batch's counts (Wang et al. 2024), not in this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from dist_llm.config.model import ModelConfig, MoEConfig
from dist_llm.models.mlp import MLP, activate
from dist_llm.ops.grouped_linear import grouped_linear
from dist_llm.ops.linear import WeightGradients
from dist_llm.ops.registry import Kernels
from dist_llm.ops.row_counts import kept_rows


class Tally:
    """What the routers of a model report to a step and take from it.

    unit: the factor on each token's loss. share: the part of a loss that this rank adds (1 / copies of its tokens).
    sum_over_sequence: adds counts [B, E] up over the ranks that hold a sequence.
    """

    def __init__(self) -> None:
        self.unit = 1.0
        self.share = 1.0
        self.sum_over_sequence: Callable[[Tensor], Tensor] = lambda counts: counts
        self.counts: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}

    def add(self, layer: int, counts: Tensor, losses: Tensor) -> None:
        """Add the tokens [E] that each expert of a layer was given; its balance and z losses and dropped rows [3]."""
        self.counts[layer] = self.counts[layer] + counts if layer in self.counts else counts
        self.losses[layer] = self.losses[layer] + losses if layer in self.losses else losses

    def clear(self) -> None:
        """Begin a step."""
        self.counts, self.losses = {}, {}


class _Report(torch.autograd.Function):
    """Passes the weights on; its backward adds the losses' gradients and tells the tally, once a backward."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, losses: Tensor, counts: Tensor, layer: int, tally: Tally) -> Tensor:
        ctx.layer, ctx.tally = layer, tally
        ctx.save_for_backward(losses.detach(), counts)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        losses, counts = ctx.saved_tensors
        ctx.tally.add(ctx.layer, counts, losses * ctx.tally.share)
        return grads[0], torch.full_like(losses, ctx.tally.unit * ctx.tally.share), None, None, None


def capacity(config: MoEConfig, choices: int) -> int:
    """Return how many of so many choices an expert takes at most; all of them when nothing is dropped."""
    factor = config.capacity_factor
    return choices if factor is None else -int(-factor * choices // config.num_experts)


class Router(nn.Module):
    """Chooses the experts of each token; computes in fp32 at least."""

    bias: Tensor

    def __init__(self, config: ModelConfig, layer: int, tally: Tally) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.moe.num_experts, dtype=torch.float32))
        self.config, self.layer, self.tally = config.moe, layer, tally

    def forward(
        self, x: Float[Tensor, "batch seq width"]
    ) -> tuple[Float[Tensor, "tokens choices"], Int64[Tensor, "tokens choices"]]:
        """Return weight and number of the experts that each token goes to, tokens in the order of x."""
        config, wide = self.config, torch.promote_types(x.dtype, torch.float32)
        logits = functional.linear(x.to(wide), self.weight.to(wide))
        scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
        chosen = (scores.detach() + self.bias.to(wide)).topk(config.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if config.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * config.scale
        if torch.is_grad_enabled():
            weights = self._report(weights, logits, scores, chosen)
        return weights.flatten(0, 1), chosen.flatten(0, 1)

    def _report(self, weights: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return the weights, with the losses hung on their backward."""
        config = self.config
        given = functional.one_hot(chosen.flatten(1), config.num_experts).sum(1)
        per_sequence = (self.tally.sum_over_sequence(given) if config.balance_loss else given).to(scores.dtype)
        tokens = per_sequence.sum(-1, keepdim=True) / config.top_k
        probabilities = scores / scores.sum(-1, keepdim=True)
        load = per_sequence * (config.num_experts / config.top_k) / tokens
        balance = config.balance_loss * (load * probabilities.sum(1)).sum()
        z = config.z_loss * logits.logsumexp(-1).square().sum()
        counts = given.sum(0)
        dropped = (counts - capacity(config, chosen.numel())).clamp(min=0).sum().to(z.dtype)
        out: Tensor = _Report.apply(  # type: ignore[no-untyped-call]
            weights, torch.stack((balance, z, dropped)), counts, self.layer, self.tally
        )
        return out


class GroupedLinear(nn.Module):
    """One matrix for each expert; with a queue in `later` a backward leaves their gradient there."""

    later: WeightGradients | None = None

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(
        self, x: Float[Tensor, "rows inputs"], counts: Int64[Tensor, " experts"]
    ) -> Float[Tensor, "rows outputs"]:
        """Map rows that are sorted by expert."""
        return grouped_linear(x, self.weight, counts, self.later)


class Experts(nn.Module):
    """The feed-forward layers of all experts side by side, without biases."""

    kernels = Kernels()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = config.moe.num_experts, config.hidden_size, config.expert_width
        self.gate = GroupedLinear(experts, width, inner) if config.activation == "swiglu" else None
        self.up = GroupedLinear(experts, width, inner)
        self.down = GroupedLinear(experts, inner, width)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Float[Tensor, "rows width"], counts: Int64[Tensor, " experts"]) -> Float[Tensor, "rows width"]:
        """Map rows that are sorted by expert."""
        gate = None if self.gate is None else self.gate(x, counts)
        out: Tensor = self.down(self.activation(self.up(x, counts), gate), counts)
        return out

    def activation(
        self, up: Float[Tensor, "rows inner"], gate: Float[Tensor, "rows inner"] | None
    ) -> Float[Tensor, "rows inner"]:
        """Return what the last linears take."""
        return activate(up, gate, self.approximate, self.kernels)


class Dispatch(Protocol):
    """Brings rows to the experts that they are for."""

    def __call__(
        self, x: Float[Tensor, "rows width"], counts: Int64[Tensor, " experts"]
    ) -> tuple[Float[Tensor, "here width"], Int64[Tensor, " experts_here"], Callable[[Tensor], Tensor]]:
        """Return the rows for the experts that are here, sorted by expert, their counts, and what sends rows back."""
        ...


def stay(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Dispatch where all experts are here; whoever splits the experts puts another in its place."""
    return x, counts, lambda out: out


class MoE(nn.Module):
    """The layer; with a capacity, rows beyond it are dropped, and layouts then differ (each cuts its own rows)."""

    def __init__(self, config: ModelConfig, layer: int, tally: Tally) -> None:
        super().__init__()
        self.config = config.moe
        self.router = Router(config, layer, tally)
        self.experts = Experts(config)
        shared = config.moe.num_shared * config.expert_width
        self.shared = MLP(config.model_copy(update={"ffn_hidden_size": shared, "bias": False})) if shared else None
        self.leave = nn.Identity()
        self.dispatch: Dispatch = stay

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch _ width"]:
        """Map every token by its experts. Under sequence parallelism this rank's part comes back."""
        weights, chosen = self.router(x)
        rows, counts = self._sorted_rows(chosen)
        token = rows // self.config.top_k
        tokens = x.flatten(0, 1)
        there, counts_there, back = self.dispatch(tokens[token], counts)
        out = back(self.experts(there, counts_there)) * weights.flatten()[rows, None].to(x.dtype)
        mixed = torch.zeros_like(tokens).index_add(0, token, out).view_as(x)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
        left: Tensor = self.leave(mixed)
        return left

    def _sorted_rows(
        self, chosen: Int64[Tensor, "tokens choices"]
    ) -> tuple[Int64[Tensor, " rows"], Int64[Tensor, " experts"]]:
        """Return the choices by expert, and how many each expert has; beyond the capacity they are left out."""
        expert = chosen.flatten()
        counts = expert.new_zeros(self.config.num_experts).scatter_add_(0, expert, torch.ones_like(expert))
        rows = expert.argsort(stable=True)
        if self.config.capacity_factor is None:
            return rows, counts
        most = capacity(self.config, expert.numel())
        starts = counts.cumsum(0) - counts
        place = torch.arange(rows.numel(), device=rows.device) - starts[expert[rows]]
        return kept_rows(rows, place < most, self.config.num_experts * most), counts.clamp(max=most)
