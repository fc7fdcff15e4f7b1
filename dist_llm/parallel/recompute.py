"""Activation recompute: a block's activations are dropped after its forward and computed again in its backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
        return out

    return run


def apply_recompute(blocks: Iterable[nn.Module]) -> None:
    """Make each block keep only its input between forward and backward (Chen et al. 2016).

    The forward's collectives are issued again in the backward.
    """
    for block in blocks:
        block.forward = _recomputed(block.forward)
