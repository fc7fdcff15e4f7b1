"""Gives the modules of a model the backends that compute their ops."""

from __future__ import annotations

from torch import nn

from dist_llm.ops.registry import Kernels


def apply_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let every module of the model that has a choice take these backends, in place."""
    for module in model.modules():
        if isinstance(getattr(module, "kernels", None), Kernels):
            module.kernels = kernels  # type: ignore[assignment]
