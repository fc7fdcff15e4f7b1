"""Between torch and bytes: dtype names, the little-endian bytes of a tensor, the checks on a shard.

Invariant: `bytes_of` stages a tensor once; what is hashed and what is written are the same buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_llm.checkpoint.cover import MAX_DIMS, IncompleteStateError, rectangle_problem
from dist_llm.types import TensorShard

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def bytes_of(data: torch.Tensor) -> memoryview:
    """Return the bytes of a non-empty tensor in row-major order; copies from a device or a strided tensor."""
    staged = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return staged.numpy().data


def empty_bytes(length: int) -> tuple[torch.Tensor, memoryview]:
    """Return an uninitialised uint8 tensor [length] and a writable view of its bytes."""
    content = torch.empty(length, dtype=torch.uint8)
    return content, content.numpy().data


def rectangle_of(content: torch.Tensor, dtype: str, lengths: tuple[int, ...]) -> torch.Tensor:
    """Return uint8 [n] seen as a tensor of the named dtype and the given lengths."""
    return content.view(_DTYPES[dtype]).view(lengths)


def check_shards(shards: Sequence[TensorShard]) -> None:
    """Raise IncompleteStateError if a shard is not a rectangle of its tensor, or two disagree about shape or dtype."""
    seen: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for shard in shards:
        described = (tuple(shard.shape), shard.data.dtype)
        if seen.setdefault(shard.name, described) != described:
            raise IncompleteStateError(
                f"tensor {shard.name} has two shapes or dtypes: {seen[shard.name]} and {described}"
            )
        if shard.data.dtype not in DTYPE_NAMES or len(shard.shape) > MAX_DIMS:
            raise IncompleteStateError(
                f"tensor {shard.name} with dtype {shard.data.dtype} and {len(shard.shape)} dims cannot be saved"
            )
        if shard.data.numel() == 0:
            continue
        problem = rectangle_problem(tuple(shard.shape), tuple(shard.offsets), tuple(shard.data.shape))
        if problem:
            raise IncompleteStateError(f"tensor {shard.name}: {problem}")
