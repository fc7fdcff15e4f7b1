"""Transformer Engine's norms are taken where it is installed, and called right, as a planted package sees it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from dist_llm.ops import transformer_engine
from dist_llm.ops.backends import TRANSFORMER_ENGINE, kernel
from dist_llm.ops.registry import Place, choose_kernels
from tests.kernels.cases import CASES, truth, with_gradients

GPU = Place("cuda", torch.bfloat16)
ASKED = {"rms_norm": "transformer_engine", "layer_norm": "transformer_engine"}
# As its own: rows of two dims, one format, what is not quantised as None, no margin, and a weight that is not less 1.
FUNCTIONS = """
from types import SimpleNamespace
import torch

DType = SimpleNamespace(kFloat32=torch.float32, kBFloat16=torch.bfloat16, kFloat16=torch.float16)

def rmsnorm_fwd(x, weight, eps, out, quantizer, kind, margin, less_one):
    assert x.dim() == 2 and x.is_contiguous() and x.dtype == weight.dtype == kind
    assert out is quantizer is None and margin == 0 and less_one is False
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
    return (x.float() * rstd[:, None] * weight.float()).to(kind), None, rstd

def rmsnorm_bwd(grad, x, rstd, weight, margin, less_one):
    assert grad.shape == x.shape and rstd.shape == x.shape[:1] and grad.dtype == x.dtype == weight.dtype
    normed, scaled = x.float() * rstd[:, None], grad.float() * weight.float()
    grad_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd[:, None]
    return grad_x.to(x.dtype), (grad.float() * normed).sum(0).to(weight.dtype)

def layernorm_fwd(x, weight, bias, eps, out, quantizer, kind, margin, less_one):
    mean = x.float().mean(-1)
    centred = x.float() - mean[:, None]
    normed, _, rstd = rmsnorm_fwd(centred.to(x.dtype), weight, eps, out, quantizer, kind, margin, less_one)
    return normed + bias, mean, rstd

def layernorm_bwd(grad, x, mean, rstd, weight, margin, less_one):
    assert mean.shape == x.shape[:1]
    centred = (x.float() - mean[:, None]).to(x.dtype)
    grad_x, grad_weight = rmsnorm_bwd(grad, centred, rstd, weight, margin, less_one)
    return (grad_x.float() - grad_x.float().mean(-1, keepdim=True)).to(x.dtype), grad_weight, grad.sum(0)
"""


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("transformer_engine")]:
        del sys.modules[name]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Plant what looks like Transformer Engine, and return its folder."""
    files = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": ""}
    for name, text in {
        **files,
        "transformer_engine_torch.so": "",
        "transformer_engine_torch/__init__.py": FUNCTIONS,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    _forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    _forget()


@pytest.mark.usefixtures("planted")
def test_it_is_offered_and_auto_leaves_it() -> None:
    chosen = choose_kernels(ASKED, False, GPU).kernels
    assert (chosen.rms_norm, chosen.layer_norm) == (TRANSFORMER_ENGINE, TRANSFORMER_ENGINE)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("dist_llm::rms_norm.transformer_engine", "CUDA")
    assert TRANSFORMER_ENGINE not in vars(choose_kernels({}, False, GPU).kernels).values()


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op in ASKED])
def test_its_norms_are_called_right(name: str, dtype: torch.dtype) -> None:
    """Under its gradients, on the CPU in the place of a GPU."""
    case = CASES[name]
    assert choose_kernels(ASKED, False, GPU).kernels.rms_norm == TRANSFORMER_ENGINE
    inputs = case.inputs((2, 3, 24), dtype, torch.float32)
    library = torch.library.Library("dist_llm", "IMPL")
    for schema, function in transformer_engine.KERNELS[case.op].items():
        library.impl(f"{schema}.transformer_engine", function, "CPU")
    with mock.patch.object(transformer_engine, "_rows", wraps=transformer_engine._rows) as rows:
        found = with_gradients(case, TRANSFORMER_ENGINE, inputs)
    library._destroy()
    assert rows.call_count == 3
    within = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(found, truth(case, inputs), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=within, atol=within * other.abs().max().item())
    with pytest.raises(NotImplementedError, match="CPU"):
        kernel("rms_norm", TRANSFORMER_ENGINE)(inputs[0], inputs[-2], 1e-5)


def test_one_that_is_not_here_or_too_old_is_named(planted: Path) -> None:
    (planted / "transformer_engine-1.13.0.dist-info").mkdir()
    (planted / "transformer_engine-1.13.0.dist-info" / "METADATA").write_text(
        "Name: transformer-engine\nVersion: 1.13.0\n"
    )
    from dist_llm.config import extensions

    extensions._find.cache_clear()
    assert "is Transformer Engine 1.13.0, older than 2.0" in str(transformer_engine.transformer_engine_problem())
    extensions._find.cache_clear()
    sys.path.remove(str(planted))
    assert "Transformer Engine is not installed: pip install" in str(transformer_engine.transformer_engine_problem())
    sys.path.insert(0, str(planted))
