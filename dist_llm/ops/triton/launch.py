"""How kernels are launched: block sizes, warps, and the device that is current meanwhile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from jaxtyping import Float
from torch import Tensor

WIDEST_NORM = 8192
"""The widest row of a norm: beyond it, the gradients of weights would spill a program's registers."""
WIDEST_ROW = 16384
"""The widest row of anything else that a program holds in registers: 1024 threads with 16 elements each."""
ELEMENTS_PER_THREAD = 16
"""What a thread holds of each tensor: two 128-bit loads of a 16-bit format."""
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def check_formats(*tensors: Tensor | None) -> None:
    """Raise TypeError for a tensor in a format that no kernel computes; None is passed over."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in FORMATS:
            raise TypeError(f"triton kernels compute fp32, bf16 and fp16, not {tensor.dtype}")


def check_alike(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all have the first one's shape and format; None is passed over."""
    first, *others = tensors
    for tensor in others:
        if first is not None and tensor is not None and (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"must be alike: {first.dtype} {[*first.shape]} and {tensor.dtype} {[*tensor.shape]}: "
                "a kernel would read past an end"
            )


def check_vectors(x: Tensor, *vectors: Tensor | None) -> None:
    """Raise ValueError unless each is as long as a row of x; None is passed over."""
    for vector in vectors:
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"must be {[*x.shape[-1:]]}, as a row of {[*x.shape]} is, not {[*vector.shape]}")


def check_row_numbers(x: Tensor, *numbers: Tensor) -> None:
    """Raise ValueError unless each is an fp32 number for every row of x."""
    for of_rows in numbers:
        if of_rows.dtype != torch.float32 or of_rows.shape != x.shape[:-1]:
            raise ValueError(f"must be fp32 {[*x.shape[:-1]]}, not {of_rows.dtype} {[*of_rows.shape]}")


def row_block(width: int, widest: int = WIDEST_ROW) -> tuple[int, int]:
    """Return the block size that holds a row of `width` elements, and its warps. Raises ValueError beyond `widest`."""
    if width > widest:
        raise ValueError(f"triton holds rows of up to {widest} elements in this kernel, not {width}")
    block: int = triton.next_power_of_2(max(width, 1))
    return block, warps_of(block)


def warps_of(block: int) -> int:
    """Return how many warps share a block of elements: 1 to 32, a power of two."""
    return max(1, min(32, block // (32 * ELEMENTS_PER_THREAD)))


def rows_of(x: Float[Tensor, "*rows width"]) -> int:
    """Return how many rows of the last dim x has."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a block in which x's device is current: triton launches on the current one, whatever its arguments say."""
    return nullcontext() if x.device.type != "cuda" else torch.accelerator.device_index(x.device.index)


FLAT_BLOCK, FLAT_WARPS = 2048, 4
"""What a program of an elementwise kernel takes, and its warps."""


def flat_grid(count: int) -> tuple[int]:
    """Return the grid of an elementwise kernel over so many elements."""
    return (triton.cdiv(count, FLAT_BLOCK),)
