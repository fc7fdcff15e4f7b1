"""AdamW (Loshchilov & Hutter 2019) on local shards, with clipping and loss-scale folded into the update.

    g <- grad / divisor;  m, v <- moments of g;  w <- w (1 - lr decay) - lr m^ / (sqrt(v^) + eps)

torch's fused kernel does it in one pass; decay acts on matrices only. State lives in the master format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dist_llm.config.training import OptimizerConfig


@dataclass(frozen=True)
class Slot:
    """A parameter's local storage, its two moments and whether it decays."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool


class AdamW:
    """The optimizer of this rank's shards; elementwise, so no rank needs another."""

    def __init__(self, weights: Sequence[Tensor], decays: Sequence[bool], config: OptimizerConfig) -> None:
        self._config = config
        self.slots = [
            Slot(weight, torch.zeros_like(weight), torch.zeros_like(weight), decay)
            for weight, decay in zip(weights, decays, strict=True)
        ]
        self.num_updates = 0

    @property
    def host_tensors(self) -> list[Tensor]:
        """What is kept in host memory for weights that are on a device: nothing."""
        return []

    def take_weights(self) -> None:
        """Take notice that the weights were set from outside: the slots are the weights themselves."""

    def step(self, grads: Sequence[Tensor | None], lr: float, divisor: Tensor) -> None:
        """Update every slot that has a gradient; gradients are divided by `divisor` (0-d) on the way in."""
        for decay in (True, False):
            chosen = [
                (slot, grad)
                for slot, grad in zip(self.slots, grads, strict=True)
                if slot.decays == decay and grad is not None and grad.numel()
            ]
            if chosen:
                self._update(chosen, lr, self._config.weight_decay if decay else 0.0, divisor)
        self.num_updates += 1

    @torch.no_grad()
    def _update(self, chosen: list[tuple[Slot, Tensor]], lr: float, weight_decay: float, divisor: Tensor) -> None:
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
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self._config.eps,
            maximize=False,
        )
