"""Which device a rank computes on, and the figures that it reports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dist_llm.errors import ConfigError
from dist_llm.runtime.device import resolve_device


@pytest.fixture
def cuda_devices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return count


@pytest.mark.parametrize("cuda_devices", [0], indirect=True)
def test_without_cuda(cuda_devices: int) -> None:
    assert resolve_device("auto", 3) == torch.device("cpu")
    assert resolve_device("cpu", 0) == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=cuda needs a CUDA device that torch can see; use cpu"):
        resolve_device("cuda", 0)


@pytest.mark.parametrize("cuda_devices", [2], indirect=True)
def test_with_two_cuda_devices(cuda_devices: int) -> None:
    assert resolve_device("auto", 1) == torch.device("cuda", 1)
    assert resolve_device("cuda", 0) == torch.device("cuda", 0)
    assert resolve_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"launcher.nproc=>2 must not exceed the CUDA devices of this node \(2\)"):
        resolve_device("auto", 2)


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ConfigError, match="device=tpu"):
        resolve_device("tpu", 0)


def test_peak_memory_grows_with_what_is_held() -> None:
    """In a process of its own: the peak of this one may lie far above what it holds now."""
    program = """
import numpy as np, torch
from dist_llm.runtime.device import peak_memory_gib, synchronize
device = torch.device("cpu")
before = peak_memory_gib(device)
held = np.ones(96 << 20, dtype=np.uint8)
assert 0.01 < before < before + 0.08 < peak_memory_gib(device) < before + 10
synchronize(device)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
