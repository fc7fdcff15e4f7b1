"""SwiGLU and GEGLU (Shazeer 2020): y = a(gate) up, a = SiLU or GELU in its tanh form; forward and backward in one pass.

    d gate = dy up a'(gate),  d up = dy a(gate);    SiLU: a = x s(x),  a' = s + x s (1 - s)

Computed in fp32; nothing is kept for backward but gate and up, from which a(gate) is computed again.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dist_llm.ops.triton.gelu import gelu_gate, gelu_slope
from dist_llm.ops.triton.launch import FLAT_BLOCK, FLAT_WARPS, check_alike, check_formats, flat_grid, on_device_of


@triton.jit
@no_type_check
def _forward(out, gate_in, up_in, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Move 3B an element (gate, up in, y out): the least."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < count
    gate = tl.load(gate_in + place, mask=here, other=0.0).to(tl.float32)
    up = tl.load(up_in + place, mask=here, other=0.0).to(tl.float32)
    factor = gelu_gate(gate) if GELU else tl.sigmoid(gate)
    tl.store(out + place, (gate * factor * up).to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def _backward(outputs, inputs, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Move 5B an element (dy, gate, up in, both gradients out): the least."""
    grad_gate_out, grad_up_out = outputs
    grad_in, gate_in, up_in = inputs
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < count
    grad = tl.load(grad_in + place, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(gate_in + place, mask=here, other=0.0).to(tl.float32)
    up = tl.load(up_in + place, mask=here, other=0.0).to(tl.float32)
    if GELU:
        factor = gelu_gate(gate)
        slope = gelu_slope(gate)
    else:
        factor = tl.sigmoid(gate)
        slope = factor + gate * factor * (1.0 - factor)
    tl.store(grad_gate_out + place, (grad * up * slope).to(grad_gate_out.dtype.element_ty), mask=here)
    tl.store(grad_up_out + place, (grad * gate * factor).to(grad_up_out.dtype.element_ty), mask=here)


def _launch(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    check_formats(gate, up)
    check_alike(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        with on_device_of(gate):
            _forward[flat_grid(gate.numel())](
                out, gate, up, gate.numel(), GELU=gelu, BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS
            )
    return out


def _launch_backward(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    check_formats(grad, gate, up)
    check_alike(gate, up, grad)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    outputs = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        with on_device_of(gate):
            _backward[flat_grid(gate.numel())](
                outputs, (grad, gate, up), gate.numel(), GELU=gelu, BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS
            )
    return outputs


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return silu(gate) * up, in their format."""
    return _launch(gate, up, gelu=False)


def swiglu_backward(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the gradients of gate and up."""
    return _launch_backward(grad, gate, up, gelu=False)


def geglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return gelu(gate) * up in GELU's tanh form, in their format."""
    return _launch(gate, up, gelu=True)


def geglu_backward(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the gradients of gate and up."""
    return _launch_backward(grad, gate, up, gelu=True)
