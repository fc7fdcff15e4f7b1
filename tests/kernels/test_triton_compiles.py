"""Each Triton kernel as it is launched for a layer's sizes: a cubin for every GPU, wide accesses, nothing spilled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton", reason="triton: not installed (it is for Linux alone)")

import torch
from torch import Tensor

from dist_llm.ops.triton import (
    adamw,
    bias_gelu,
    cross_entropy,
    gated,
    layer_norm,
    moe_permute,
    rms_norm,
    rope,
    softmax,
    sum_of_squares,
    top_k_gate,
    weight_gradient,
)
from tests.kernels.ahead_of_time import ARCHITECTURES, REGISTERS, SHARED_BYTES, compile_launch, launches_of

ROWS, WIDTH = 512, 4096
NARROW = 4
"""Instructions of a kernel for numbers of a row or a program; a tile read in pieces would have 8 or more."""
MORE_NARROW = {
    "adamw._update": 6,  # the scalars
    "cross_entropy._statistics": 6,  # target, its logit, four results
    "top_k_gate._forward": 20,  # weight and index of 8 choices
    "top_k_gate._backward": 36,  # gradient and index of 8 choices, twice
}
"""Those of kernels that have more."""


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rms_norm(dtype: torch.dtype, width: int = WIDTH) -> None:
    x, weight, rstd = _meta(ROWS, width, dtype=dtype), _meta(width), _meta(ROWS)
    rms_norm.rms_norm(x, weight, 1e-5)
    rms_norm.add_rms_norm(x, x, weight, 1e-5)
    rms_norm.rms_norm_backward(x, x, x, weight, rstd)


def _layer_norm(dtype: torch.dtype, width: int = WIDTH) -> None:
    x, weight, rstd = _meta(ROWS, width, dtype=dtype), _meta(width), _meta(ROWS)
    layer_norm.layer_norm(x, weight, weight, 1e-5)
    layer_norm.add_layer_norm(x, x, weight, None, 1e-5)
    layer_norm.layer_norm_backward(x, x, x, weight, rstd, rstd)


def _gated(dtype: torch.dtype) -> None:
    x = _meta(ROWS, WIDTH, dtype=dtype)
    gated.swiglu(x, x)
    gated.swiglu_backward(x, x, x)
    gated.geglu(x, x)
    gated.geglu_backward(x, x, x)


def _bias_gelu(dtype: torch.dtype) -> None:
    x, bias = _meta(ROWS, WIDTH, dtype=dtype), _meta(WIDTH)
    bias_gelu.bias_gelu(x, bias)
    bias_gelu.bias_gelu_backward(x, x, bias)


def _rope(dtype: torch.dtype) -> None:
    q, k, table = _meta(2, ROWS, 32, 128, dtype=dtype), _meta(2, ROWS, 8, 128, dtype=dtype), _meta(ROWS, 64)
    rope.rope_(q, k, table, table)
    rope.rope(q, k, table, table, inverse=True)


def _softmax(dtype: torch.dtype, keys: int = 2048) -> None:
    x, mask = _meta(2, 4, 2048, keys, dtype=dtype), _meta(2, 1, 2048, keys, dtype=torch.bool)
    softmax.scaled_masked_softmax(x, None, 0.1, causal=True)
    softmax.scaled_masked_softmax(x, mask, 0.1, causal=False)
    softmax.scaled_masked_softmax_backward(x, x, 0.1)


def _cross_entropy(dtype: torch.dtype) -> None:
    logits, targets, numbers = _meta(ROWS, 128256, dtype=dtype), _meta(ROWS, dtype=torch.int64), _meta(ROWS)
    whole = cross_entropy.Vocabulary(0, 128256, 128256)
    cross_entropy.cross_entropy_statistics(logits, targets, whole)
    cross_entropy.cross_entropy_gradient_(logits, targets, _meta(1), (numbers, numbers), whole, 0.1, 1e-4)


def _adamw(dtype: torch.dtype) -> None:
    state, narrow = _meta(1 << 20), _meta(1 << 20, dtype=torch.bfloat16)
    rule = adamw.Rule(0.9, 0.95, 1e-8, 0.1)
    adamw.adamw_flat_(state, (state, state), _meta(1 << 20, dtype=dtype), narrow, _meta(6), rule)


def _sum_of_squares(dtype: torch.dtype) -> None:
    sum_of_squares.sum_of_squares(_meta(1 << 20, dtype=dtype))


def _weight_gradient(dtype: torch.dtype) -> None:
    narrow = torch.float16 if dtype == torch.float32 else dtype
    x = _meta(ROWS, WIDTH, dtype=narrow)
    weight_gradient.add_weight_gradient(_meta(WIDTH, WIDTH), x, x)


def _moe_permute(dtype: torch.dtype) -> None:
    x, there = _meta(ROWS, WIDTH, dtype=dtype), _meta(2 * ROWS, WIDTH, dtype=dtype)
    rows, places, weights = _meta(2 * ROWS, dtype=torch.int64), _meta(ROWS, 2, dtype=torch.int64), _meta(ROWS, 2)
    moe_permute.moe_permute(x, rows, 2)
    moe_permute.moe_permute_backward(there, places)
    moe_permute.moe_unpermute(there, weights, places)
    moe_permute.moe_unpermute_backward(x, there, weights, rows)


def _top_k_gate(_: torch.dtype) -> None:
    logits, bias, grad, chosen = _meta(ROWS, 64), _meta(64), _meta(ROWS, 8), _meta(ROWS, 8, dtype=torch.int64)
    for sigmoid in (False, True):
        gate = top_k_gate.Gate(8, sigmoid, True, 1.0)
        top_k_gate.top_k_gate(logits, bias, gate)
        top_k_gate.top_k_gate_backward(grad, logits, chosen, gate)


OPS: dict[str, Callable[[torch.dtype], None]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "gated": _gated,
    "bias_gelu": _bias_gelu,
    "rope": _rope,
    "softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
    "sum_of_squares": _sum_of_squares,
    "weight_gradient": _weight_gradient,
    "moe_permute": _moe_permute,
    "top_k_gate": _top_k_gate,
}
WIDEST: dict[str, Callable[[torch.dtype], None]] = {
    "rms_norm": lambda dtype: _rms_norm(dtype, 8192),
    "layer_norm": lambda dtype: _layer_norm(dtype, 8192),
    "softmax": lambda dtype: _softmax(dtype, 16384),
}


def _check(call: Callable[[], None], architecture: int, folder: Path) -> None:
    launches = launches_of(call)
    assert launches
    for launch in launches:
        compiled = compile_launch(launch, architecture, folder)
        assert (compiled.stack_bytes, compiled.local_bytes) == (0, 0), f"{launch.name} spills registers"
        assert compiled.registers_of_a_program <= REGISTERS, f"{launch.name} cannot be launched"
        assert compiled.shared_bytes <= SHARED_BYTES, f"{launch.name} cannot be launched"
        assert ".f64" not in compiled.ptx, f"{launch.name} computes in fp64"
        wide, narrow = compiled.accesses
        assert wide, f"{launch.name}: no 128-bit accesses"
        assert narrow <= MORE_NARROW.get(launch.name, NARROW), f"{launch.name}: {narrow} accesses of less than 128 bits"


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_bf16(op: str, architecture: int, tmp_path: Path) -> None:
    _check(lambda: OPS[op](torch.bfloat16), architecture, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_other_formats(op: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _check(lambda: OPS[op](dtype), 90, tmp_path)


@pytest.mark.parametrize("op", WIDEST)
def test_widest_row(op: str, tmp_path: Path) -> None:
    _check(lambda: WIDEST[op](torch.bfloat16), 80, tmp_path)


def test_a_spill_is_seen(tmp_path: Path) -> None:
    with (
        mock.patch.object(rms_norm, "WIDEST_NORM", 16384),
        pytest.raises(AssertionError, match=r"rms_norm\._backward spills registers"),
    ):
        _check(lambda: _rms_norm(torch.bfloat16, 16384), 90, tmp_path)


def test_a_narrow_access_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no 128-bit accesses"):
        _check(lambda: _rms_norm(torch.bfloat16, 4095), 90, tmp_path)
