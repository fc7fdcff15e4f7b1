"""AdamW (Loshchilov & Hutter 2019) on local shards, with clipping and loss-scale folded into the update.

    g <- grad / divisor;  m, v <- moments of g;  w <- w (1 - lr decay) - lr rate m^ / (sqrt(v^) + eps)

`rate` is a weight's own factor (muP); decay does not follow it, so that it acts alike at every width, as in Yang's mup
(Kosson et al. 2025 say why). torch's fused kernel does it in one pass. State lives in the master format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.optim.adamw import adamw

from dist_llm.config.training import OptimizerConfig


@dataclass(frozen=True)
class Slot:
    """A parameter's local storage, its two moments, whether it decays, and the factor on its learning rate."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool
    rate: float


class AdamW:
    """The optimizer of this rank's shards; elementwise, so no rank needs another."""

    def __init__(
        self, weights: Sequence[Tensor], decays: Sequence[bool], rates: Sequence[float], config: OptimizerConfig
    ) -> None:
        self._config = config
        self.slots = [
            Slot(weight, torch.zeros_like(weight), torch.zeros_like(weight), decay, rate)
            for weight, decay, rate in zip(weights, decays, rates, strict=True)
        ]
        self.num_updates = 0

    @property
    def host_tensors(self) -> list[Tensor]:
        """What is kept in host memory for weights that are on a device: nothing."""
        return []

    def take_weights(self) -> None:
        """Take notice that the weights were set from outside: the slots are the weights themselves."""

    def step(
        self, grads: Sequence[Tensor | None], lr: float, divisor: Tensor, skip: Float32[Tensor, ""] | None = None
    ) -> None:
        """Update every slot that has a gradient, unless `skip` is 1; gradients are divided by `divisor` (0-d).

        Counts it in `num_updates`: who reads `skip` takes a step that was skipped back.
        """
        groups: dict[tuple[bool, float], list[tuple[Slot, Tensor]]] = {}
        for slot, grad in zip(self.slots, grads, strict=True):
            if grad is not None and grad.numel():
                groups.setdefault((slot.decays, slot.rate), []).append((slot, grad))
        for (decay, rate), chosen in groups.items():
            self._update(chosen, lr * rate, self._config.weight_decay / rate if decay else 0.0, (divisor, skip))
        self.num_updates += 1

    @torch.no_grad()
    def _update(
        self, chosen: list[tuple[Slot, Tensor]], lr: float, weight_decay: float, how: tuple[Tensor, Tensor | None]
    ) -> None:
        divisor, skip = how
        weight = chosen[0][0].weight
        device = weight.device
        grads = [grad for _, grad in chosen]
        if weight.dtype == torch.float64:  # the fused kernel reads its divisor as fp32
            torch._foreach_div_(grads, divisor.to(device))
        steps = torch.full((len(chosen),), float(self.num_updates), device=device).unbind()
        adamw(
            [slot.weight for slot, _ in chosen],
            grads,
            [slot.exp_avg for slot, _ in chosen],
            [slot.exp_avg_sq for slot, _ in chosen],
            [],
            list(steps),
            fused=True,
            grad_scale=None if weight.dtype == torch.float64 else divisor.to(device, torch.float32),
            found_inf=None if skip is None else skip.to(device),
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self._config.eps,
            maximize=False,
        )
