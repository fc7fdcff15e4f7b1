"""oneDNN multiplies for linear layers, forward and backward, as torch's BLAS does, where the registry says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_llm.errors import ConfigError
from dist_llm.models.kernels import apply_kernels
from dist_llm.models.transformer import Transformer
from dist_llm.ops.backends import ONEDNN, REFERENCE
from dist_llm.ops.linear import SMALLEST_PRODUCT, WeightGradients, linear
from dist_llm.ops.registry import Kernels, Place, choose_kernels
from tests.parallel.tiny import LLAMA, tiny_config

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="kernels: this torch has no oneDNN",
)
SHAPES = [((2, 64, 192), 256), ((131, 257), 263), ((0, 64), 32), ((3, 5), 7)]
"""Of x, and how many outputs: large, of odd widths, without rows, too small for oneDNN."""
BOUND = 2e-6
"""Of the largest error over the largest value: sums of a few hundred terms in fp32."""


def _inputs(shape: tuple[int, ...], outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + outputs)
    shapes = (shape, (outputs, shape[-1]), (outputs,), (*shape[:-1], outputs))
    x, weight, bias, pull = (torch.randn(each, generator=generator).to(dtype) for each in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), pull


def _close(found: Tensor, truth: Tensor) -> bool:
    return not truth.numel() or bool((found - truth).abs().max() <= BOUND * truth.abs().max() * 4)


@needs_onednn
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_products_are_those_of_fp64(shape: tuple[int, ...], outputs: int, with_bias: bool) -> None:
    *leaves, pull = _inputs(shape, outputs, torch.float32)
    *wide, wide_pull = _inputs(shape, outputs, torch.float64)
    leaves, wide = (each if with_bias else each[:2] for each in (leaves, wide))
    out = linear(leaves[0], leaves[1], leaves[2] if with_bias else None, backend=ONEDNN)
    truth = nn.functional.linear(*wide)
    assert _close(out, truth)
    grads, wanted = torch.autograd.grad(out, leaves, pull), torch.autograd.grad(truth, wide, wide_pull)
    assert all(_close(*pair) for pair in zip(grads, wanted, strict=True))


@needs_onednn
def test_large_products_are_its_own_and_small_ones_are_not() -> None:
    def multiplied(rows: int) -> list[str]:
        x, weight, _, pull = _inputs((rows, 256), 256, torch.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            linear(x, weight, None, backend=ONEDNN).backward(pull)
        return [event.key for event in profile.key_averages() if "_linear_pointwise" in event.key]

    enough = SMALLEST_PRODUCT // 256**2
    assert len(multiplied(enough)) == 1
    assert multiplied(enough - 1) == []


@needs_onednn
def test_it_can_be_differentiated_twice() -> None:
    x, weight, bias, _ = _inputs((128, 256), 256, torch.float32)
    found = {}
    for backend in (ONEDNN, REFERENCE):
        (grad,) = torch.autograd.grad(linear(x, weight, bias, backend=backend).square().sum(), x, create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), (x, weight))
    assert all(_close(*pair) for pair in zip(found[ONEDNN], found[REFERENCE], strict=True))


@needs_onednn
def test_weight_gradients_wait_for_it_too() -> None:
    x, weight, bias, pull = _inputs((128, 256), 256, torch.float32)
    wanted = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), pull)
    later = WeightGradients()
    (grad,) = torch.autograd.grad(linear(x, weight, bias, later, ONEDNN), x, pull)
    assert weight.grad is None
    later.take()()
    assert weight.grad is not None
    assert bias.grad is not None
    assert all(_close(*pair) for pair in zip((grad, weight.grad, bias.grad), wanted, strict=True))


@needs_onednn
def test_a_model_of_it_is_the_same_model() -> None:
    config = tiny_config(None, {**LLAMA, "hidden_size": 64, "ffn_hidden_size": 256}).model
    tokens = torch.arange(512).view(8, 64) % config.vocab_size
    outs = []
    for backend in (ONEDNN, REFERENCE):
        model = Transformer(config)
        apply_kernels(model, Kernels(linear=backend))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2, generator=generator)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                outs.append(model(tokens))
        assert ("mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}) == (backend == ONEDNN)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_auto_takes_it_where_torchs_own_products_are_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(maker: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        return choose_kernels({}, False, Place(device, dtype, maker=maker)).kernels.linear

    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert chosen("AuthenticAMD") == ONEDNN
    assert chosen("GenuineIntel") == chosen("AuthenticAMD", dtype=torch.bfloat16) == REFERENCE
    assert chosen("AuthenticAMD", device="cuda") == REFERENCE
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert chosen("AuthenticAMD") == REFERENCE
    with pytest.raises(ConfigError, match=r"kernels.linear=onednn cannot be had: oneDNN multiplies on a CPU in fp32"):
        choose_kernels({"linear": ONEDNN}, True, Place("cuda", torch.float32))
