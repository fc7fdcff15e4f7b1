"""Runs every op in every format in this process."""

from __future__ import annotations

import torch

from dist_llm.ops.backends import NATIVE
from tests.kernels.cases import CASES, backends_of, truth, with_gradients

WITHIN = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def largest_gap() -> float:
    """Return the largest distance of a native result from the reference, over what its format allows."""
    worst = 0.0
    for case in CASES.values():
        if NATIVE not in backends_of(case.op):
            return float("inf")
        for dtype, within in WITHIN.items():
            inputs = case.inputs((5, 131), dtype, torch.float32)
            for found, wanted in zip(with_gradients(case, NATIVE, inputs), truth(case, inputs), strict=True):
                gap = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
                worst = max(worst, gap.item() / within)
    return worst
