"""NVIDIA apex's norms are taken where they are the real ones, and called right, as a planted package sees it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_llm.ops.apex import apex_problem
from dist_llm.ops.backends import APEX
from dist_llm.ops.layer_norm import add_layer_norm, layer_norm
from dist_llm.ops.registry import Place, choose_kernels
from dist_llm.ops.rms_norm import add_rms_norm, rms_norm

GPU = Place("cuda", torch.bfloat16)
ASKED = {"rms_norm": "apex", "layer_norm": "apex"}
# As apex's own: one format for all that a kernel takes, and a list of the sizes that are normed.
NORMS = """
from torch.nn import functional

def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert type(normalized_shape) is list and weight.dtype == input.dtype
    return functional.rms_norm(input, normalized_shape, weight, eps)

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert type(normalized_shape) is list and weight.dtype == bias.dtype == input.dtype
    return functional.layer_norm(input, normalized_shape, weight, bias, eps)
"""


def _plant(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Plant what looks like NVIDIA's apex, and return its folder."""
    files = {
        "apex/__init__.py": "",
        "apex/optimizers/fused_adam.py": "",
        "apex/normalization/__init__.py": "",
        "apex/normalization/fused_layer_norm.py": NORMS,
        "amp_C.so": "",
        "fused_layer_norm_cuda.py": "",
    }
    _plant(tmp_path, files, monkeypatch)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.mark.usefixtures("apex")
def test_the_real_one_is_offered_and_auto_leaves_it() -> None:
    assert apex_problem() is None
    chosen = choose_kernels(ASKED, False, GPU).kernels
    assert (chosen.rms_norm, chosen.layer_norm) == (APEX, APEX)
    assert APEX not in vars(choose_kernels({}, False, GPU).kernels).values()
    on_cpu = choose_kernels(ASKED, False, Place("cpu", torch.float32)).fallbacks
    assert {op: on_cpu[op] for op in ASKED} == {op: f"apex's {op} is for cuda alone, not cpu" for op in ASKED}


@pytest.mark.usefixtures("apex")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_norms_are_called_right(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 8).to(dtype)
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8)
    within = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for found, wanted in (
        (rms_norm(x, weight, 1e-3, APEX), rms_norm(x, weight, 1e-3)),
        (layer_norm(x, weight, bias, 1e-3, APEX), layer_norm(x, weight, bias, 1e-3)),
        (layer_norm(x, weight, None, 1e-3, APEX), layer_norm(x, weight, None, 1e-3)),
    ):
        torch.testing.assert_close(found, wanted, **within)
    found = *add_rms_norm(x, residual, weight, 1e-3, APEX), *add_layer_norm(x, residual, (weight, bias), 1e-3, APEX)
    wanted = *add_rms_norm(x, residual, weight, 1e-3), *add_layer_norm(x, residual, (weight, bias), 1e-3)
    torch.testing.assert_close(found, wanted, **within)
    found[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_the_web_framework_of_that_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(tmp_path, {"apex/__init__.py": "", "apex/lib/libapex.py": ""}, monkeypatch)
    chosen = choose_kernels({"rms_norm": "apex"}, False, GPU)
    assert "is not NVIDIA's apex (it has no optimizers/fused_adam.py)" in chosen.fallbacks["rms_norm"]


def test_one_without_its_norms_is_named(apex: Path) -> None:
    (apex / "fused_layer_norm_cuda.py").unlink()
    sys.path_importer_cache.clear()
    assert "was built without fused_layer_norm_cuda: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install" in str(apex_problem())
