"""The pieces of ops/block_attention.py by torch's fused kernels, which never hold all scores at once.

    cpu, meta   flash attention; takes every format, masks and grouped heads
    cuda        flash attention, memory-efficient attention with a mask or in fp32; the reference where neither takes it

A backward gets output and log-sum-exp over *all* keys: weights exp(s - lse) are then those of the whole softmax.
Sources: Dao et al. 2022 and Dao 2023 (flash); Rabe & Staats 2021 (memory-efficient); Liu et al. 2023 (over a ring).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn import functional

from dist_llm.ops import block_attention
from dist_llm.ops.block_attention import Piece

_aten: Any = torch.ops.aten
_ROWS, _COLUMNS = 32, 16
"""The efficient kernel wants rows of log-sum-exps and columns of biases in multiples of these."""


class _Flash:
    """Flash attention on the CPU."""

    def attend(self, piece: Piece) -> tuple[Tensor, Tensor]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            piece.query, piece.key, piece.value, 0.0, piece.causal, attn_mask=_bias(piece), scale=piece.scale
        )
        return out, lse

    def gradients(self, piece: Piece, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (grad_out, piece.query, piece.key, piece.value, out, lse)
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, piece.causal, attn_mask=_bias(piece), scale=piece.scale
        )
        return grads


class _FlashCuda:
    """Flash attention on CUDA: bf16 and fp16, no mask, grouped heads as they are."""

    def attend(self, piece: Piece) -> tuple[Tensor, Tensor]:
        found = _aten._scaled_dot_product_flash_attention(
            piece.query, piece.key, piece.value, 0.0, piece.causal, False, scale=piece.scale
        )
        return found[0], found[1]

    def gradients(self, piece: Piece, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The random state is read for dropout alone.
        state = torch.zeros(2, dtype=torch.uint64, device=out.device)
        tensors = (grad_out, piece.query, piece.key, piece.value, out.contiguous(), lse.contiguous())
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_backward(
            *tensors,
            None,
            None,
            piece.query.shape[2],
            piece.key.shape[2],
            0.0,
            piece.causal,
            state,
            state[:1],
            scale=piece.scale,
        )
        return grads


class _EfficientCuda:
    """Memory-efficient attention on CUDA: fp32 too, and masks; of grouped heads each asker gets its copy."""

    def _arguments(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        repeats = piece.query.shape[1] // piece.key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (piece.key, piece.value))
        bias, keys = _bias(piece), piece.key.shape[2]
        if bias is not None:
            bias = functional.pad(bias, (0, -keys % _COLUMNS))[..., :keys].expand(-1, piece.query.shape[1], -1, -1)
        return piece.query, key, value, bias

    def attend(self, piece: Piece) -> tuple[Tensor, Tensor]:
        query, key, value, bias = self._arguments(piece)
        out, lse, _, _ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, piece.causal, scale=piece.scale
        )
        return out, lse[..., : query.shape[2]]

    def gradients(self, piece: Piece, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, bias = self._arguments(piece)
        padded = functional.pad(lse, (0, -query.shape[2] % _ROWS), value=math.inf)
        # The random state is read for dropout alone.
        state = torch.zeros((), dtype=torch.int64, device=out.device)
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            grad_out,
            query,
            key,
            value,
            bias,
            out,
            padded.contiguous(),
            state,
            state,
            0.0,
            [True, True, True, False],
            piece.causal,
            scale=piece.scale,
        )
        groups = (piece.key.shape[1], -1)
        return grads[0], *(x.unflatten(1, groups).sum(dim=2) for x in grads[1:3])


def _bias(piece: Piece) -> Tensor | None:
    """Return 0 where a query sees a key and -inf elsewhere."""
    if piece.mask is None:
        return None
    bias = torch.zeros(piece.mask.shape, dtype=piece.query.dtype, device=piece.mask.device)
    return bias.masked_fill_(~piece.mask, -math.inf)


def _kernel(piece: Piece) -> Any:
    """Return what computes the piece: fused kernels where they take it, else the reference."""
    device = piece.query.device.type
    if device in ("cpu", "meta"):
        return _Flash()
    if device == "cuda":
        repeats = piece.query.shape[1] // piece.key.shape[1]
        plain = SDPAParams(piece.query, piece.key, piece.value, None, 0.0, piece.causal, repeats > 1)
        # The kernel itself takes widths in steps of 8; torch's own attention pads before it calls it.
        if piece.mask is None and piece.query.shape[-1] % 8 == 0 and can_use_flash_attention(plain):
            return _FlashCuda()
        # As the efficient kernel sees it: a key head for every query head.
        key, value = (x[:, :1].expand(-1, piece.query.shape[1], -1, -1) for x in (piece.key, piece.value))
        if can_use_efficient_attention(SDPAParams(piece.query, key, value, None, 0.0, piece.causal, False)):
            return _EfficientCuda()
    return block_attention


def attend(piece: Piece) -> tuple[Float[Tensor, "batch heads queries head"], Float[Tensor, "batch heads queries"]]:
    """Return output and log-sum-exp; a query that sees no key has log-sum-exp -inf and a finite output."""
    out: Tensor
    lse: Tensor
    if piece.mask is None:
        out, lse = _kernel(piece).attend(piece)
        return out, lse
    # What a kernel answers to a query without a key is its own affair (0, or not a number): such a one sees all keys
    # here, and then weighs nothing. Backwards need no such care: exp(-inf - lse) is 0.
    seen = piece.mask.any(dim=-1)
    full = Piece(piece.query, piece.key, piece.value, piece.mask | ~seen[..., None], False, piece.scale)
    out, lse = _kernel(full).attend(full)
    return out, lse.masked_fill(~seen, -math.inf)


def gradients(
    piece: Piece,
    out: Float[Tensor, "batch heads queries head"],
    lse: Float[Tensor, "batch heads queries"],
    grad_out: Float[Tensor, "batch heads queries head"],
) -> tuple[
    Float[Tensor, "batch heads queries head"],
    Float[Tensor, "batch groups keys head"],
    Float[Tensor, "batch groups keys head"],
]:
    """Return what the piece adds to the gradients of its query, key and value; `out` and `lse` are over all keys."""
    grads: tuple[Tensor, Tensor, Tensor] = _kernel(piece).gradients(piece, out, lse, grad_out)
    return grads
