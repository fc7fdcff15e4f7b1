"""Counter-based randomness and the reference norms."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from dist_llm.ops.counter_rng import hash_counter, keep_mask, key_of, normal, uniform
from dist_llm.ops.dropout import dropout
from dist_llm.ops.rms_norm import rms_norm


def test_hash_is_splitmix64() -> None:
    """The first outputs of splitmix64 seeded with 0, as published with the generator."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    counters = torch.arange(1, 4)
    assert [value % 2**64 for value in hash_counter(counters, 0).tolist()] == published


def test_draws_have_the_right_distribution() -> None:
    counters = torch.arange(200_000)
    flat, bell = uniform(counters, key_of("u")), normal(counters, key_of("n"))
    assert abs(flat.mean().item() - 0.5) < 3e-3
    assert flat.min() > 0
    assert flat.max() < 1
    assert abs(bell.mean().item()) < 7e-3
    assert abs(bell.std().item() - 1) < 5e-3
    within = (bell.abs() < 1).double().mean().item()
    assert abs(within - math.erf(1 / math.sqrt(2))) < 4e-3


def test_a_part_draws_what_the_whole_would() -> None:
    key = key_of("init", 0, "layers.0.mlp.up.weight")
    assert torch.equal(normal(torch.arange(1000), key)[300:400], normal(torch.arange(300, 400), key))


def test_keep_mask_drops_the_given_share() -> None:
    for drop in (0.0, 0.1, 0.5, 0.9):
        kept = keep_mask(torch.arange(100_000), 5, drop).double().mean().item()
        assert abs(kept - (1 - drop)) < 6e-3


def test_dropout_of_a_part_of_the_sequence() -> None:
    x, samples = torch.ones(2, 8, 32), torch.tensor([3, 11])
    tokens = torch.arange(x.shape[1])
    whole = dropout(x, 0.3, 9, samples, tokens)
    assert torch.equal(whole[:, 4:], dropout(x[:, 4:], 0.3, 9, samples, tokens[4:]))
    assert set(whole.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_rms_norm_is_torchs() -> None:
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), functional.rms_norm(x, (7,), weight, 1e-5))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))
