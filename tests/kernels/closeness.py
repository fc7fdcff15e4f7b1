"""When a kernel's result is that of the formula in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.tolerances import KERNEL_SUM, KERNEL_ULPS


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless each element is near: by steps of the format there, and by the largest's rounding."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    wanted, got = expected.double(), actual.double()
    assert not got.isnan().any(), "not a number"
    if not wanted.numel():
        return
    step = torch.exp2(torch.frexp(wanted).exponent.double() - 1) * torch.finfo(actual.dtype).eps
    bound = KERNEL_ULPS * step + KERNEL_SUM * wanted.abs().max()
    excess = ((got - wanted).abs() - bound).max().item()
    assert excess <= 0, f"{excess:.3g} beyond the bound; largest {wanted.abs().max().item():.3g}"
