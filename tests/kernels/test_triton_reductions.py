"""Cross entropy, weight gradients and mixtures of experts in Triton, interpreted, against the formula in fp64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton: not installed (it is for Linux alone)")

import torch
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.triton import column_sum, cross_entropy, moe_permute, top_k_gate, weight_gradient
from dist_llm.types import IGNORE_INDEX
from tests.kernels.closeness import check_close
from tests.kernels.interpreter import interpreted

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def _leaf(x: Tensor) -> Tensor:
    return x.double().requires_grad_()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-3)])
@interpreted
def test_cross_entropy_of_split_logits(smoothing: float, z_loss: float, ranks: int, dtype: torch.dtype) -> None:
    rows, size, columns = 4, 6000, 6144 // ranks
    # The maximum rises from piece to piece, so that what was summed before has to be scaled.
    logits = (4 * torch.randn(rows, size) + torch.linspace(0, 8, size)).to(dtype)
    targets = torch.tensor([0, IGNORE_INDEX, size - 1, 3071])
    wide = _leaf(logits)
    lse = wide.logsumexp(-1)
    losses = functional.cross_entropy(wide, targets, reduction="none", label_smoothing=smoothing) + z_loss * lse**2
    counted = targets != IGNORE_INDEX
    losses = losses * counted
    (3 * losses.sum()).backward()

    padded = functional.pad(logits, (0, columns * ranks - size), value=50.0)
    parts = [part.contiguous() for part in padded.split(columns, 1)]
    shares = [
        cross_entropy.Vocabulary(rank * columns, min(columns, size - rank * columns), size) for rank in range(ranks)
    ]
    found = [
        cross_entropy.cross_entropy_statistics(part, targets, share) for part, share in zip(parts, shares, strict=True)
    ]
    for tops, sums in found:
        assert not tops[~counted].any()
        assert torch.equal(sums[:, ~counted].flatten(), torch.tensor([1.0, 0.0, 0.0]))
    top = torch.stack([tops for tops, _ in found]).amax(0)
    raised = sum(sums[0] * torch.exp(tops - top) for tops, sums in found)
    target, plain = (sum(sums[index] for _, sums in found) for index in (1, 2))
    joined = top + torch.log(raised)
    check_close(joined[counted], lse.detach()[counted])
    loss = joined - (1 - smoothing) * target - smoothing / size * plain + z_loss * joined**2
    check_close(loss * counted, losses.detach())
    pulls = torch.full((1,) if ranks == 1 else (rows,), 3.0)
    for part, share in zip(parts, shares, strict=True):
        cross_entropy.cross_entropy_gradient_(part, targets, pulls, (top, raised), share, smoothing, z_loss)
    grad = torch.cat(parts, 1)
    check_close(grad[:, :size], wide.grad)
    assert not grad[:, size:].any()


@interpreted
def test_cross_entropy_of_a_rank_that_holds_only_padding() -> None:
    logits, share = torch.randn(2, 16), cross_entropy.Vocabulary(32, -4, 28)
    targets = torch.tensor([3, 30])
    top, sums = cross_entropy.cross_entropy_statistics(logits, targets, share)
    assert torch.equal(top, torch.full((2,), -torch.inf))
    assert not sums.any()
    cross_entropy.cross_entropy_gradient_(logits, targets, torch.ones(1), (torch.zeros(2), torch.ones(2)), share)
    assert not logits.any()


@interpreted
def test_logits_that_the_gradient_cannot_be_written_over_are_refused() -> None:
    share = cross_entropy.Vocabulary(0, 4, 4)
    with pytest.raises(ValueError, match="must be contiguous"):
        cross_entropy.cross_entropy_statistics(torch.randn(4, 2).t(), torch.zeros(2, dtype=torch.int64), share)


@interpreted
def test_column_sum_of_many_parts() -> None:
    parts = torch.randn(70, 130)
    check_close(column_sum.column_sum(parts, torch.float32), parts.double().sum(0))
    check_close(column_sum.column_sum(parts, torch.bfloat16), parts.double().sum(0))


@pytest.mark.parametrize("sizes", [(33, 130, 7), (70, 16, 140)], ids=str)
@interpreted
def test_weight_gradient(sizes: tuple[int, int, int]) -> None:
    rows, outputs, inputs = sizes
    dtype = torch.float16  # the interpreter multiplies the bits of bf16 as if they were integers
    grad, x, total = (
        torch.randn(rows, outputs).to(dtype),
        torch.randn(rows, inputs).to(dtype),
        torch.randn(outputs, inputs),
    )
    expected = total.double() + grad.double().t() @ x.double()
    weight_gradient.add_weight_gradient(total, grad, x)
    check_close(total, expected)


def test_a_weight_gradient_of_mixed_formats_is_refused() -> None:
    with pytest.raises(TypeError, match="both be bf16 or both fp16"):
        weight_gradient.add_weight_gradient(torch.zeros(2, 2), torch.zeros(3, 2), torch.zeros(3, 2).bfloat16())


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@interpreted
def test_rows_go_to_their_experts_and_back(dtype: torch.dtype) -> None:
    tokens, top_k, width, experts = 4, 2, 2100, 3
    chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    rows = chosen.flatten().argsort(stable=True)[:-1]  # the last choice of the last expert is dropped
    places = torch.full((tokens * top_k,), -1).index_copy(0, rows, torch.arange(len(rows))).view(tokens, top_k)
    x, grad, weights = (
        torch.randn(tokens, width).to(dtype),
        torch.randn(tokens, width).to(dtype),
        torch.rand(tokens, top_k),
    )
    there = moe_permute.moe_permute(x, rows, top_k)
    assert torch.equal(there, x[rows // top_k])
    wide, scale = _leaf(there), _leaf(weights)
    mixed = torch.zeros(tokens, width).double().index_add(0, rows // top_k, wide * scale.flatten()[rows, None])
    mixed.backward(grad.double())
    check_close(moe_permute.moe_unpermute(there, weights, places), mixed.detach())
    grad_there, grad_weights = moe_permute.moe_unpermute_backward(grad, there, weights, rows)
    check_close(grad_there, wide.grad)
    check_close(grad_weights, scale.grad)
    summed = torch.zeros(tokens, width).double().index_add(0, rows // top_k, there.double())
    check_close(moe_permute.moe_permute_backward(there, places), summed)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("shape", [(5, 6, 2), (3, 300, 8), (2, 1, 1)], ids=str)
@interpreted
def test_top_k_gate(shape: tuple[int, int, int], sigmoid: bool, normalize: bool) -> None:
    tokens, experts, top_k = shape
    gate = top_k_gate.Gate(top_k, sigmoid, normalize, 2.5)
    logits, bias, grad = torch.randn(tokens, experts), 0.1 * torch.randn(experts), torch.randn(tokens, top_k)
    wide = _leaf(logits)
    scores = wide.sigmoid() if sigmoid else wide.softmax(-1)
    best = (scores.detach() + bias).topk(top_k).indices
    expected = scores.gather(-1, best)
    expected = 2.5 * (expected / expected.sum(-1, keepdim=True) if normalize else expected)
    expected.backward(grad.double())
    weights, chosen = top_k_gate.top_k_gate(logits, bias, gate)
    assert torch.equal(chosen, best)
    check_close(weights, expected.detach())
    found = top_k_gate.top_k_gate_backward(grad, logits, chosen, gate)
    assert wide.grad is not None
    if experts == 1:  # one expert's softmax and normalised weight are constants: what is left is rounding
        assert (found - wide.grad).abs().max() <= 1e-6
    else:
        check_close(found, wide.grad)


@interpreted
def test_of_equal_scores_the_first_expert_is_taken() -> None:
    gate = top_k_gate.Gate(2, False, True, 1.0)
    _, chosen = top_k_gate.top_k_gate(torch.zeros(3, 5), torch.zeros(5), gate)
    assert torch.equal(chosen, torch.tensor([[0, 1]] * 3))
