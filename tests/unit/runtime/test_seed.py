"""Seeds give the same draws, and a saved generator state goes on where it was."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dist_llm.runtime.seed import generator_state, set_determinism, set_generator_state


@pytest.fixture(autouse=True)
def _globals_kept() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_rng_state(state)


def _draws() -> tuple[float, float, list[float]]:
    return random.random(), float(np.random.random()), torch.rand(3).tolist()


def test_the_seed_decides_every_generator() -> None:
    set_determinism(7, deterministic=False)
    first = _draws()
    set_determinism(7, deterministic=False)
    assert _draws() == first
    set_determinism(8, deterministic=False)
    assert _draws() != first


def test_a_seed_wider_than_numpy_takes() -> None:
    set_determinism(2**63 - 1, deterministic=False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_follows_the_setting(deterministic: bool) -> None:
    set_determinism(0, deterministic)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_saved_state_goes_on_where_it_was() -> None:
    set_determinism(3, deterministic=False)
    torch.rand(5)
    state = {name: tensor.clone() for name, tensor in generator_state().items()}
    assert all(tensor.dtype == torch.uint8 and tensor.device.type == "cpu" for tensor in state.values())
    expected = torch.rand(4)
    torch.rand(100)
    set_generator_state(state)
    assert torch.equal(torch.rand(4), expected)
