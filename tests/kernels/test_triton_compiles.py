"""Each Triton kernel as it is launched for a layer's sizes: a cubin for every GPU, wide accesses, nothing spilled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton: not installed (it is for Linux alone)")

import torch
from torch import Tensor

from dist_llm.ops.triton import layer_norm, rms_norm
from tests.kernels.ahead_of_time import ARCHITECTURES, REGISTERS, SHARED_BYTES, compile_launch, launches_of

ROWS, WIDTH = 512, 4096
WIDE_SHARE = 0.9
"""At least so much of what a kernel reads and writes has to go in 128-bit accesses."""
NARROW: dict[str, float] = {}
"""Less for kernels that read a number a row, or a place that the data decides."""


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


OPS: dict[str, Callable[[torch.dtype], None]] = {"rms_norm": _rms_norm, "layer_norm": _layer_norm}
WIDEST: dict[str, Callable[[torch.dtype], None]] = {
    "rms_norm": lambda dtype: _rms_norm(dtype, 8192),
    "layer_norm": lambda dtype: _layer_norm(dtype, 8192),
}


def _check(call: Callable[[], None], architecture: int, folder: Path) -> None:
    launches = launches_of(call)
    assert launches
    for launch in launches:
        compiled = compile_launch(launch, architecture, folder)
        assert (compiled.stack_bytes, compiled.local_bytes) == (0, 0), f"{launch.name} spills registers"
        assert compiled.registers_of_a_program <= REGISTERS, f"{launch.name} cannot be launched"
        assert compiled.shared_bytes <= SHARED_BYTES, f"{launch.name} cannot be launched"
        wide = NARROW.get(launch.name, WIDE_SHARE)
        assert compiled.wide_share >= wide, f"{launch.name}: {compiled.wide_share:.2f} in 128-bit accesses"


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_bf16(op: str, architecture: int, tmp_path: Path) -> None:
    _check(lambda: OPS[op](torch.bfloat16), architecture, tmp_path)


@pytest.mark.parametrize("op", OPS)
def test_fp32(op: str, tmp_path: Path) -> None:
    _check(lambda: OPS[op](torch.float32), 90, tmp_path)


@pytest.mark.parametrize("op", WIDEST)
def test_widest_row(op: str, tmp_path: Path) -> None:
    _check(lambda: WIDEST[op](torch.bfloat16), 80, tmp_path)


def test_a_spill_is_seen(tmp_path: Path) -> None:
    norm = rms_norm
    norm_limit = norm.WIDEST_NORM
    norm.WIDEST_NORM = 16384
    try:
        with pytest.raises(AssertionError, match=r"rms_norm\._backward spills registers"):
            _check(lambda: _rms_norm(torch.bfloat16, 16384), 90, tmp_path)
    finally:
        norm.WIDEST_NORM = norm_limit


def test_a_narrow_access_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="128-bit"):
        _check(lambda: _rms_norm(torch.bfloat16, 4095), 90, tmp_path)
