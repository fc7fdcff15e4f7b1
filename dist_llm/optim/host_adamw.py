"""AdamW on the host: master weights and moments live in host memory, and the update runs there (ZeRO-Offload).

    device   gradient  --->  host   gradient buffer, m, v, master weight  --->  device   weight

All gradients are on their way before the first is waited for, and a weight goes back while the next is updated.
Source: Ren et al. 2021. The update is elementwise, so its numbers are those of `AdamW` on CPU, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float32
from torch import Tensor

from dist_llm.config.training import OptimizerConfig
from dist_llm.optim.adamw import AdamW
from dist_llm.runtime.host_memory import HostMemory


class HostAdamW(AdamW):
    """AdamW of weights on a device whose masters, moments and gradient buffers are in host memory."""

    def __init__(
        self, weights: Sequence[Tensor], decays: Sequence[bool], rates: Sequence[float], config: OptimizerConfig
    ) -> None:
        self._weights = list(weights)
        self._memory = HostMemory(weights[0].device)
        masters = [self._memory.empty_like(weight) for weight in weights]
        super().__init__(masters, decays, rates, config)
        self._grads = [self._memory.empty_like(weight) for weight in weights]
        self.take_weights()

    @property
    def host_tensors(self) -> list[Tensor]:
        """All that this keeps in host memory."""
        return [t for slot in self.slots for t in (slot.weight, slot.exp_avg, slot.exp_avg_sq)] + self._grads

    def take_weights(self) -> None:
        """Make the masters equal to the weights on the device."""
        for slot, weight in zip(self.slots, self._weights, strict=True):
            slot.weight.copy_(weight)

    def step(
        self, grads: Sequence[Tensor | None], lr: float, divisor: Tensor, skip: Float32[Tensor, ""] | None = None
    ) -> None:
        """Update masters and weights of every slot that has a gradient, as AdamW does. Waits for the device."""
        coming = [
            (slot, weight, buffer, self._memory.fetch(buffer, grad))
            for slot, weight, buffer, grad in zip(self.slots, self._weights, self._grads, grads, strict=True)
            if grad is not None and grad.numel()
        ]
        for slot, weight, buffer, arrived in coming:
            arrived()
            decay = self._config.weight_decay / slot.rate if slot.decays else 0.0
            self._update([(slot, buffer)], lr * slot.rate, decay, (divisor, skip))
            self._memory.send(weight, slot.weight)
        self._memory.finish()
        self.num_updates += 1
