"""Cross entropy of logits on one rank or two, by each backend, is the formula in fp64; native takes no memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_llm.ops.backends import NATIVE, REFERENCE, TORCH
from dist_llm.ops.cross_entropy import Vocabulary, gradient_, local_statistics, token_losses
from dist_llm.ops.registry import native_problem
from dist_llm.parallel.activations import ActivationLog
from dist_llm.parallel.cross_entropy import cross_entropy_sum
from dist_llm.runtime.pool import WorkerPool
from dist_llm.types import IGNORE_INDEX
from tests.kernels.axes import ALONE, two_ranks
from tests.kernels.closeness import check_close

needs_library = pytest.mark.skipif(
    native_problem("cross_entropy") is not None, reason=f"kernels: {native_problem('cross_entropy')}"
)
BACKENDS = [REFERENCE, pytest.param(NATIVE, marks=needs_library)]
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def _targets(rows: int, size: int) -> Tensor:
    targets = torch.arange(rows) * 7919 % size
    targets[::5] = IGNORE_INDEX
    targets[1] = size - 1
    return targets


def _truth(logits: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return losses by row and the gradient of three times their sum, in fp64."""
    wide = logits.double().requires_grad_()
    losses = functional.cross_entropy(wide, targets, reduction="none", label_smoothing=smoothing)
    losses = (losses + z_loss * wide.logsumexp(-1) ** 2) * (targets != IGNORE_INDEX)
    (grad,) = torch.autograd.grad(3 * losses.sum(), wide)
    return losses.detach(), grad


@pytest.mark.parametrize("backend", [*BACKENDS, TORCH])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_one_rank(backend: str, dtype: torch.dtype, mean: float) -> None:
    """With padded columns, whose logits would be the largest."""
    size, columns = 5001, 5120
    logits = (mean + 4 * torch.randn(2, 7, columns)).to(dtype)
    logits[..., size:] += 50
    targets = _targets(14, size)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy_sum(leaf, targets.view(2, 7), size, ALONE, backend)
    (3 * loss).backward()
    wanted, grad = _truth(logits[..., :size].flatten(0, 1), targets)
    assert loss.dtype == torch.float32
    check_close(loss.detach(), wanted.sum())
    assert leaf.grad is not None
    assert torch.equal(leaf, logits), "a leaf is nobody's to write over"
    check_close(leaf.grad.flatten(0, 1)[:, :size], grad)
    assert not leaf.grad[..., size:].any()
    assert not leaf.grad.flatten(0, 1)[::5].any()


def loss_and_gradient(
    backend: str, dtype: torch.dtype, size: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the logits of all ranks, the targets, this rank's loss and the gradient of its part."""
    axis = two_ranks()
    generator = torch.Generator().manual_seed(3)
    whole = (3 * torch.randn(1, 12, 2 * columns, generator=generator)).to(dtype)
    targets = _targets(12, size)
    leaf = whole[..., axis.index * columns : (axis.index + 1) * columns].clone().requires_grad_()
    loss = cross_entropy_sum(leaf * 1, targets[None], size, axis, backend)
    (3 * loss).backward()
    assert leaf.grad is not None
    return whole[0], targets, loss.detach(), leaf.grad[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("size", "columns"), [(1500, 768), (700, 768)], ids=["padded", "only padding on one"])
def test_two_ranks(pool: WorkerPool, backend: str, dtype: torch.dtype, size: int, columns: int) -> None:
    found = pool.run(loss_and_gradient, backend, dtype, size, columns, world=2)
    whole, targets, loss, _ = found[0]
    wanted, grad = _truth(whole[:, :size], targets)
    assert torch.equal(loss, found[1][2])
    check_close(loss, wanted.sum())
    together = torch.cat([part for *_, part in found], -1)
    check_close(together[:, :size], grad)
    assert not together[:, size:].any()


@needs_library
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-3), (0.1, 1e-3)])
def test_smoothing_and_z_loss(smoothing: float, z_loss: float, dtype: torch.dtype) -> None:
    """Of two parts of the vocabulary, reduced here; each row has a gradient of its own."""
    rows, size, columns = 11, 6000, 3072
    logits = (4 * torch.randn(rows, size) + torch.linspace(0, 8, size)).to(dtype)
    targets = _targets(rows, size)
    wanted, grad = _truth(logits, targets, smoothing, z_loss)
    padded = functional.pad(logits, (0, 2 * columns - size), value=50.0)
    parts = [part.contiguous() for part in padded.split(columns, 1)]
    shares = [Vocabulary(rank * columns, min(columns, size - rank * columns), size) for rank in range(2)]
    tops, sums = zip(*(local_statistics(p, targets, s) for p, s in zip(parts, shares, strict=True)), strict=True)
    top = torch.stack(tops).amax(0)
    whole = sum(
        numbers * torch.stack([torch.exp(t - top), *2 * [torch.ones(rows)]])
        for t, numbers in zip(tops, sums, strict=True)
    )
    assert isinstance(whole, Tensor)
    counted = targets != IGNORE_INDEX
    check_close(token_losses(top, whole, size, smoothing, z_loss) * counted, wanted)
    scale = torch.linspace(1, 2, rows)
    for part, share in zip(parts, shares, strict=True):
        gradient_(part, targets, scale * 3, (top, whole[0].contiguous()), share, (smoothing, z_loss))
    found = torch.cat(parts, 1)
    check_close(found[:, :size], grad * scale[:, None])
    assert not found[:, size:].any()


@needs_library
def test_exp_is_within_a_millionth() -> None:
    """With a sum of 1 and a target that another rank has, the gradient is exp itself."""
    x = torch.cat((torch.linspace(-87, 0, 100_001), -torch.logspace(-8, 1, 9999)))[None].contiguous()
    wanted = x.double().exp()
    one, nothing = torch.ones(1), torch.zeros(1)
    gradient_(x, torch.tensor([x.shape[1] + 5]), one, (nothing, one), Vocabulary(0, x.shape[1], 2 * x.shape[1]))
    assert ((x.double() - wanted).abs() / wanted).max() <= 1e-6


@needs_library
def test_the_gradient_is_written_over_the_logits() -> None:
    """Peak memory of forward and backward: the logits and five hundredths. The reference takes as much again."""

    for dtype in (torch.float32, torch.bfloat16):
        for backend in (NATIVE, REFERENCE):
            leaf = torch.randn(1, 64, 2048).to(dtype).requires_grad_()
            log = ActivationLog(())
            with log:
                logits = leaf.clone()  # whose gradient is that of the clone, in its place
                place = logits.data_ptr()
                loss = cross_entropy_sum(logits, _targets(64, 2048)[None], 2048, ALONE, backend)
                del logits
                loss.backward()
            assert leaf.grad is not None
            peak = log.peak(0, log.mark()) / leaf.nbytes
            if backend == NATIVE:
                assert peak <= 1.05
                assert leaf.grad.data_ptr() == place
            else:
                assert peak > 1.9


@needs_library
def test_logits_that_others_saved_are_found_changed() -> None:
    leaf = torch.randn(1, 3, 16, requires_grad=True)
    logits = leaf.tanh()  # keeps its result
    loss = cross_entropy_sum(logits, _targets(3, 16)[None], 16, ALONE, NATIVE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_runs_once(backend: str) -> None:
    leaf = torch.randn(1, 3, 16, requires_grad=True)
    loss = cross_entropy_sum(leaf * 1, _targets(3, 16)[None], 16, ALONE, backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torchs_is_refused_of_a_part_of_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="needs the whole vocabulary, which 2 ranks share"):
        cross_entropy_sum(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64), 16, replace(ALONE, size=2), TORCH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_gradient_is_an_error(backend: str) -> None:
    leaf = torch.randn(1, 3, 16, requires_grad=True)
    loss = cross_entropy_sum(leaf * 1, _targets(3, 16)[None], 16, ALONE, backend)
    with pytest.raises(NotImplementedError, match="cross_entropy_sum has no second gradient"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_without_bounds(backend: str) -> None:
    """-inf weighs nothing; a NaN or +inf in a counted row is seen."""
    targets = torch.tensor([[1, 2]])
    for value in (-torch.inf, torch.inf, torch.nan):
        leaf = torch.randn(1, 2, 40)
        leaf[0, 1, 7] = value
        leaf.requires_grad_()
        loss = cross_entropy_sum(leaf * 1, targets, 40, ALONE, backend)
        loss.backward()
        assert leaf.grad is not None
        assert loss.isfinite() == (value == -torch.inf)
        assert leaf.grad[0, 0].isfinite().all()
        assert leaf.grad[0, 1].isnan().any() == (value != -torch.inf)


@needs_library
def test_what_does_not_fit_is_an_error() -> None:
    targets, logits, row = torch.zeros(2, dtype=torch.int64), torch.randn(2, 4), torch.zeros(2)
    with pytest.raises(RuntimeError, match="logits must be contiguous: their gradient is written over them"):
        torch.ops.dist_llm.cross_entropy_statistics(torch.randn(4, 2).t(), targets, 0, 4, IGNORE_INDEX)
    with pytest.raises(RuntimeError, match=r"targets must be int64 \[2\], not Int \[2\]"):
        torch.ops.dist_llm.cross_entropy_statistics(logits, targets.int(), 0, 4, IGNORE_INDEX)
    with pytest.raises(RuntimeError, match="top must be contiguous float32 with a number for each of 2 rows"):
        torch.ops.dist_llm.cross_entropy_gradient_(logits, targets, row, row[:1], row, 0, 4, 4, IGNORE_INDEX, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="a vocabulary of 3 cannot have a part of 4"):
        gradient_(logits, targets, row, (row, row), Vocabulary(0, 4, 3))
