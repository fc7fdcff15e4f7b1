"""GELU (Hendrycks & Gimpel 2016) in its tanh form, inside kernels: x s(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).

(1 + tanh u) / 2 is the logistic function s of 2u, which needs one exp and is exact at both ends.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def gelu_gate(x):
    """Return s(2u), by which GELU multiplies x (fp32)."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
@no_type_check
def gelu_slope(x):
    """Return the derivative of GELU at x (fp32): s + x s (1 - s) (2u)'."""
    gate = gelu_gate(x)
    return gate + x * gate * (1.0 - gate) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
